#!lua flags=allow-oom
-- A heartbeat. KEYS: jobs. ARGV: lease_ms, then for each: id, token, progress, step, steps ('' leaves them)
-- -> tokens to drop
-- include: base

local drop = {}
for i = 4, #ARGV, 5 do
  local id, token = ARGV[i], ARGV[i + 1]
  local key = K.job .. id
  local known = redis.call('HMGET', key, 'st', 'tk', 'pg', 'sp', 'ss', 'xc', 'od')
  if known[1] == 'running' and known[2] == token and not known[7] then
    redis.call('ZADD', K.leases, lease_end(ARGV[3], known[6]), id)
    local set = {}
    for n, field in ipairs({'pg', 'sp', 'ss'}) do
      local value = ARGV[i + 1 + n]
      if value ~= '' and value ~= known[2 + n] then
        set[#set + 1] = field
        set[#set + 1] = value
      end
    end
    if #set > 0 then
      redis.call('HSET', key, unpack(set))
    end
  else
    drop[#drop + 1] = token
  end
end
return drop
