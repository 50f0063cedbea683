#!lua
-- Makes a staged batch visible, all or none. Commands are grouped by key, since this is the longest step of the store.
-- KEYS: job of each, chunks, [idempotency].
-- ARGV: limit, fingerprint, number of jobs, number of chunks, ids to answer with (joined by commas), lane id,
-- definition, ... -> {'ok', replayed, ids} | {'reused'} | {'full', queued} | {'taken'} | {'expired'}: stage again |
-- {'unknown', number of the job, number of the job in its `after` that does not exist}
-- include: submitted

local size, chunks, joined = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7]
local idempotency = KEYS[size + chunks + 1]
local earlier = earlier_call(idempotency, ARGV[4], joined)
if earlier then
  return earlier
end

-- Calls a command with a long list, in parts that fit on Lua's stack.
local function in_parts(list, from, till, call)
  for i = from, till, 2000 do
    call(unpack(list, i, math.min(i + 1999, till)))
  end
end

local exist = 0
in_parts(KEYS, 1, size, function(...)
  exist = exist + redis.call('EXISTS', ...)
end)
if exist == size then
  return {'ok', 0, joined}
elseif exist > 0 then
  return {'taken'}
end
local queued = queued_jobs()
if queued + size > tonumber(ARGV[3]) then
  return {'full', queued}
end
local jobs, batch = {}, {}
for i = size + 1, size + chunks do
  local packed = redis.call('GET', KEYS[i])
  if not packed then
    return {'expired'}
  end
  for _, job in ipairs(cmsgpack.unpack(packed)) do
    local unknown = judge_after(job[2], batch)
    if unknown then
      return {'unknown', #jobs, unknown}
    end
    jobs[#jobs + 1] = job
    batch[job[1]] = true
  end
end

local definitions = {}
for i = 8, #ARGV, 2 do
  definitions[ARGV[i]] = ARGV[i + 1]
end
local zsets, added = {}, {}
local function add(key, score, member)
  local list = zsets[key]
  if not list then
    list = {}
    zsets[key] = list
  end
  list[#list + 1] = score
  list[#list + 1] = member
end
local function add_count(key, field)
  added[key] = added[key] or {}
  added[key][field] = (added[key][field] or 0) + 1
end
local lines, doomed = {}, {}
for n, job in ipairs(jobs) do
  local id, j = job[1], job[2]
  if j.doomed then
    doomed[#doomed + 1] = id
  end
  local due = place_new(j, definitions[j.ln])
  redis.call('PERSIST', K.spec .. id)
  write_new(id, j)
  add(listed(j, 'queued'), j.cr, id)
  add_count(K.priorities, j.pr)
  if j.gj then
    add(K.children .. j.gj, n, id)
  end
  if not j.kn then
    add(K.ttl, tonumber(j.en) + tonumber(j.qt), id)
  end
  if due then
    add(K.scheduled, due, id)
  elseif not j.kn and not j.wr then
    local line = line_of(j.ln, j.pr, j.ow or '')
    lines[line] = j
    add(line, j.en, id)
    add(K.waiting .. j.cl, tonumber(j.en) - BOOST[j.pr], id)
    add_count(K.lane_waiting, j.ln)
  end
end
for _, j in pairs(lines) do
  line_up(j)
end
for key, list in pairs(zsets) do
  in_parts(list, 1, #list, function(...)
    redis.call('ZADD', key, ...)
  end)
end
for key, fields in pairs(added) do
  for field, by in pairs(fields) do
    redis.call('HINCRBY', key, field, by)
  end
end
for n, id in ipairs(doomed) do
  if budget > 0 then
    budget = budget - 1
    settle('k', '', id)
  else
    redis.call('ZADD', K.unsettled .. 'k' .. doomed[1] .. '.0', n, id)
    put_off('k' .. doomed[1] .. '.0')
  end
end
redis.call('DEL', unpack(KEYS, size + 1, size + chunks))
remember_call(idempotency, ARGV[4], joined)
return {'ok', 0, joined}
