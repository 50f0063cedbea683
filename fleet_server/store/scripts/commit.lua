#!lua
-- Makes a batch visible, all or none: jobs that come along, or those that were staged. Commands are grouped by key, since
-- this is the longest step of the store.
-- KEYS: job of each, chunks, [idempotency].
-- ARGV: limit, fingerprint, number of jobs, number of chunks (0: the jobs come along, 1,000 at most), ids to answer with (joined by
-- commas), number of lanes, lane id, definition, ..., then what comes along: id, spec, number of fields, field, value, ...
-- -> {'ok', replayed, ids, positions} | {'reused'} | {'full', queued} | {'taken'} | {'expired'}: stage again |
-- {'unknown', number of the job, number of the job in its `after` that does not exist}
-- include: submitted

local size, chunks, joined_ids = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local idempotency = KEYS[size + chunks + 1]
local earlier = earlier_call(idempotency, ARGV[4], joined_ids)
if earlier then
  return earlier
end

local definitions, at = {}, 9
for _ = 1, ARGV[8] do
  definitions[ARGV[at]] = ARGV[at + 1]
  at = at + 2
end
local jobs, spec_keys, specs = {}, {}, {}
while at <= #ARGV do
  local j = {}
  for i = at + 3, at + 2 + 2 * ARGV[at + 2], 2 do
    j[ARGV[i]] = ARGV[i + 1]
  end
  jobs[#jobs + 1] = {ARGV[at], j}
  spec_keys[#spec_keys + 1] = K.spec .. ARGV[at]
  specs[#specs + 1] = spec_keys[#spec_keys]
  specs[#specs + 1] = ARGV[at + 1]
  at = at + 3 + 2 * ARGV[at + 2]
end

local function places()
  local found = {}
  for _, job in ipairs(jobs) do
    if not job[2].gj then
      found[#found + 1] = place(job[1], job[2])
    end
  end
  return found
end

-- What is there already: of jobs that come along with their specs, another spec is another job.
for n, there in ipairs(#jobs > 0 and redis.call('MGET', unpack(spec_keys)) or {}) do
  if there and there ~= specs[2 * n] then
    return {'taken', n - 1}
  end
end
local exist = 0
for i = 1, size, PARTS do
  exist = exist + redis.call('EXISTS', unpack(KEYS, i, math.min(i + PARTS - 1, size)))
end
if exist == size then
  return {'ok', 0, joined_ids, places()}
elseif exist > 0 then
  return {'taken'}
end
local queued = queued_jobs()
if queued + size > tonumber(ARGV[3]) then
  return {'full', queued}
end
for i = size + 1, size + chunks do
  local packed = redis.call('GET', KEYS[i])
  if not packed then
    return {'expired'}
  end
  for _, job in ipairs(cmsgpack.unpack(packed)) do
    jobs[#jobs + 1] = job
  end
end
local batch = {}
for n, job in ipairs(jobs) do
  local unknown = judge_after(job[2], batch)
  if unknown then
    return {'unknown', n - 1, unknown}
  end
  batch[job[1]] = true
end

gather_indexes()
if #specs > 0 then
  redis.call('MSET', unpack(specs))
end
for n, job in ipairs(jobs) do
  if chunks > 0 then
    redis.call('PERSIST', K.spec .. job[1])
  end
  enter(job[1], job[2], definitions[job[2].ln], n)
end
all_entered()
if chunks > 0 then
  redis.call('DEL', unpack(KEYS, size + 1, size + chunks))
end
remember_call(idempotency, ARGV[4], joined_ids)
return {'ok', 0, joined_ids, places()}
