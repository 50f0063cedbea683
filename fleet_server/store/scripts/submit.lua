#!lua
-- One job. KEYS: job, spec, [idempotency]. ARGV: limit, fingerprint, id, lane definition, spec, field, value, ...
-- -> {'ok', replayed, ids joined by commas, position} | {'reused'} | {'full', queued} | {'taken'} | {'unknown', 0, number
-- of the job in `after` that does not exist}
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
local queued = queued_jobs()
if queued >= tonumber(ARGV[3]) then
  return {'full', queued}
end

local j = {}
for i = 8, #ARGV, 2 do
  j[ARGV[i]] = ARGV[i + 1]
end
local unknown = judge_after(j)
if unknown then
  return {'unknown', 0, unknown}
end
local doomed = j.doomed
redis.call('SET', KEYS[2], spec)
local due = place_new(j, ARGV[6])
write_new(id, j)
arrive(id, j, due)
if doomed then
  settle('k', '', id)
end
remember_call(KEYS[3], ARGV[4], id)
return {'ok', 0, id, place(id, j)}
