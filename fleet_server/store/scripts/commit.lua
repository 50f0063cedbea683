#!lua
-- Makes a staged batch visible, all or none. Commands are grouped by key, since this is the longest step of the store.
-- KEYS: job of each, chunks, [idempotency].
-- ARGV: limit, fingerprint, number of chunks, number of lanes, lane id, definition, ..., job id, ...
-- -> {'ok', replayed, ids} | {'reused'} | {'full', queued} | {'taken'} | {'expired'}: stage again
-- include: jobs
-- include: submitted

local chunks = tonumber(ARGV[5])
local first = 7 + 2 * tonumber(ARGV[6])
local size = #ARGV - first + 1
local joined = table.concat(ARGV, ',', first)
local idempotency = KEYS[size + chunks + 1]
local earlier = earlier_call(idempotency, ARGV[4], joined)
if earlier then
  return earlier
end
local exist = redis.call('EXISTS', unpack(KEYS, 1, size))
if exist == size then
  return {'ok', 0, joined}
elseif exist > 0 then
  return {'taken'}
end
local queued = redis.call('ZCARD', K.state .. 'queued')
if queued + size > tonumber(ARGV[3]) then
  return {'full', queued}
end
local jobs = {}
for i = size + 1, size + chunks do
  local packed = redis.call('GET', KEYS[i])
  if not packed then
    return {'expired'}
  end
  for _, job in ipairs(cmsgpack.unpack(packed)) do
    jobs[#jobs + 1] = job
  end
end

local definitions = {}
for i = 7, first - 1, 2 do
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
local lines = {}
for _, job in ipairs(jobs) do
  local id, j = job[1], job[2]
  local due = place_new(j, definitions[j.ln])
  redis.call('PERSIST', K.spec .. id)
  write_new(id, j)
  add(K.state .. 'queued', j.cr, id)
  add(K.ttl, tonumber(j.en) + tonumber(j.qt), id)
  add_count(K.priorities, j.pr)
  if due then
    add(K.scheduled, due, id)
  else
    local line = line_of(j.ln, j.pr, j.ow or '')
    lines[line] = j
    add(line, j.en, id)
    add(K.waiting .. j.cl, tonumber(j.en) - BOOST[j.pr], id)
    add_count(K.lane_waiting, j.ln)
  end
end
for _, j in pairs(lines) do
  line_up(j, 1)
end
for key, list in pairs(zsets) do
  redis.call('ZADD', key, unpack(list))
end
for key, fields in pairs(added) do
  for field, by in pairs(fields) do
    redis.call('HINCRBY', key, field, by)
  end
end
redis.call('DEL', unpack(KEYS, size + 1, size + chunks))
remember_call(idempotency, ARGV[4], joined)
return {'ok', 0, joined}
