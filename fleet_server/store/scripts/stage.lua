#!lua
-- Up to 50 jobs of a batch, aside and with a TTL until commit. Repeatable.
-- KEYS: where this chunk stays. ARGV: then for each job: id, spec, number of fields, field, value, ...
-- -> {'ok'} | {'taken', index of the job within this chunk}
-- include: base

local jobs = {}
local at = 3
while at <= #ARGV do
  local id, spec, fields = ARGV[at], ARGV[at + 1], tonumber(ARGV[at + 2])
  local j = {}
  for i = at + 3, at + 2 + 2 * fields, 2 do
    j[ARGV[i]] = ARGV[i + 1]
  end
  local staged = redis.call('GET', K.spec .. id)
  if redis.call('EXISTS', K.job .. id) == 1 or staged and staged ~= spec then
    return {'taken', #jobs}
  end
  jobs[#jobs + 1] = {id, j, spec}
  at = at + 3 + 2 * fields
end

for _, job in ipairs(jobs) do
  redis.call('SET', K.spec .. job[1], job[3], 'PX', C.STAGED_TTL_MS)
  job[3] = nil
end
redis.call('SET', KEYS[1], cmsgpack.pack(jobs), 'PX', C.STAGED_TTL_MS)
return {'ok'}
