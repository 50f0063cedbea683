#!lua flags=no-writes
-- Whole jobs, each read at one instant. KEYS: job, spec, result, attempts of each
-- -> for each {hash, spec, result, attempts} | false

local out = {}
for i = 1, #KEYS, 4 do
  local flat = redis.call('HGETALL', KEYS[i])
  if #flat == 0 then
    out[#out + 1] = false
  else
    local spec, result = redis.call('GET', KEYS[i + 1]), redis.call('GET', KEYS[i + 2])
    out[#out + 1] = {flat, spec, result, redis.call('LRANGE', KEYS[i + 3], 0, -1)}
  end
end
return out
