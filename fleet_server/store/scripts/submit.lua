#!lua
-- One job. KEYS: job, spec, [idempotency]. ARGV: limit, fingerprint, id, lane definition, spec, field, value, ...
-- -> {'ok', replayed, ids joined by commas, position} | {'reused'} | {'full', queued} | {'taken'}
-- include: jobs
-- include: submitted

local id, spec = ARGV[5], ARGV[7]
local earlier = earlier_call(KEYS[3], ARGV[4], id)
if earlier then
  return earlier
end
local known = load(id)
if known then
  if redis.call('GET', KEYS[2]) ~= spec then
    return {'taken'}
  end
  return {'ok', 0, id, place(id, known)}
end
local queued = redis.call('ZCARD', K.state .. 'queued')
if queued >= tonumber(ARGV[3]) then
  return {'full', queued}
end

local j = {}
for i = 8, #ARGV, 2 do
  j[ARGV[i]] = ARGV[i + 1]
end
redis.call('SET', KEYS[2], spec)
local due = place_new(j, ARGV[6])
write_new(id, j)
arrive(id, j, due, 1)
remember_call(KEYS[3], ARGV[4], id)
return {'ok', 0, id, place(id, j)}
