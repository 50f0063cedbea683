#!lua
-- Jobs that stand alone, each as if it had come by itself.
-- KEYS: for each: job, spec, idempotency (or the job again). ARGV: limit, then for each: fingerprint or '', id, lane
-- definition, spec, number of fields, field, value, ...
-- -> for each {'ok', replayed, ids joined by commas, position} | {'reused'} | {'full', queued} | {'taken'} | {'unknown', 0,
-- number of the job in `after` that does not exist}
-- include: submitted

local limit, queued = tonumber(ARGV[3]), nil
local out, lasting = {}, {}

local function submitted(n, at)
  local fingerprint, id, spec = ARGV[at], ARGV[at + 1], ARGV[at + 3]
  local idempotency = fingerprint ~= '' and KEYS[3 * n] or nil
  local earlier = earlier_call(idempotency, fingerprint, id)
  if earlier then
    return earlier
  end
  local known = load(id)
  if known then
    if redis.call('GET', KEYS[3 * n - 1]) ~= spec then
      return {'taken'}
    end
    lasting[n] = {id, known}
    return {'ok', 0, id}
  end
  queued = queued or queued_jobs()
  if queued >= limit then
    return {'full', queued}
  end

  local j = {}
  for i = at + 5, at + 4 + 2 * ARGV[at + 4], 2 do
    j[ARGV[i]] = ARGV[i + 1]
  end
  local unknown = judge_after(j)
  if unknown then
    return {'unknown', 0, unknown}
  end
  queued = queued + 1
  redis.call('SET', KEYS[3 * n - 1], spec)
  enter(id, j, ARGV[at + 2], n)
  remember_call(idempotency, fingerprint, id)
  lasting[n] = {id, j}
  return {'ok', 0, id}
end

gather_indexes()
local at = 4
while at <= #ARGV do
  out[#out + 1] = submitted(#out + 1, at)
  at = at + 5 + 2 * ARGV[at + 4]
end
all_entered()
for n, job in pairs(lasting) do
  out[n][4] = place(job[1], job[2])
end
return out
