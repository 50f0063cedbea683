-- include: ends

-- What a call with the same idempotency key came to: nil if there was none.
local function earlier_call(key, fingerprint, ids)
  local stored = key and redis.call('GET', key)
  if not stored then
    return nil
  end
  local cut = string.find(stored, '\n', 1, true)
  if string.sub(stored, 1, cut - 1) ~= fingerprint then
    return {'reused'}
  end
  local first = string.sub(stored, cut + 1)
  return {'ok', first == ids and 0 or 1, first, false}
end

local function remember_call(key, fingerprint, ids)
  if key then
    redis.call('SET', key, fingerprint .. '\n' .. ids, 'PX', C.IDEMPOTENCY_TTL_MS)
  end
end

local function queued_jobs()
  return redis.call('ZCARD', K.state .. 'queued') + redis.call('ZCARD', K.child_state .. 'queued')
end

local function place(id, j)
  local rank = redis.call('ZRANK', K.waiting .. j.cl, id)
  return rank and rank + 1 or false
end

-- Reads what a new job waits for (`af`, ids joined by NUL): `parents` that have not succeeded, and `doomed` if one failed
-- or was cancelled. Returns nil, or the number of the first that does not exist. `batch` are ids of the same submit.
local function judge_after(j, batch)
  if not j.af then
    return nil
  end
  local number = 0
  j.parents = {}
  for parent in string.gmatch(j.af, '%Z+') do
    local state = batch and batch[parent] and 'queued' or redis.call('HGET', K.job .. parent, 'st')
    if not state then
      return number
    end
    j.doomed = j.doomed or state == 'failed' or state == 'cancelled'
    if state ~= 'succeeded' then
      j.parents[#j.parents + 1] = parent
    end
    number = number + 1
  end
  return nil
end

-- Gives a new job its lane and times; returns the time before which it is not in line. `joined` has the lanes that others
-- of this step were given.
local function place_new(j, definition, joined)
  if j.kn then
    j.kl = j.kn
  else
    local lane = joined[j.ln]
    if lane then
      count(K.lane_jobs, lane, 1)
    else
      lane = join_lane(j.ln, definition, j.cl)
      joined[j.ln] = lane
    end
    if lane ~= j.ln then
      j.ld = definition
      j.ln = lane
    end
  end
  local due = j.sc and tonumber(j.sc) > NOW and j.sc or nil
  j.st, j.ge, j.ve = 'queued', '1', '1'
  j.cr, j.up, j.en = int(NOW), int(NOW), due or int(NOW)
  if j.parents and #j.parents > 0 then
    j.wr, j.wa = 'DEPENDENCY', #j.parents
    return nil
  elseif due then
    j.wr = 'SCHEDULED'
  end
  return due
end

local function write_new(id, j)
  j.ki, j.li = kind_of(j), limits_of(j)
  local parents, doomed = j.parents or {}, j.doomed
  j.parents, j.doomed, j.af = nil, nil, nil
  local args = {'st', j.st, 'ge', j.ge, 've', j.ve, 'up', j.up, 'en', j.en, 'ki', j.ki, 'li', j.li}
  for _, field in ipairs({'mo', 'ow', 'wr', 'ld', 'gj', 'kn', 'kl', 'xc', 'wa', 'iu'}) do
    if j[field] then
      args[#args + 1] = field
      args[#args + 1] = j[field]
    end
  end
  redis.call('HSET', K.job .. id, unpack(args))
  if j.iu then
    hold_inputs(j)
  end
  for _, parent in ipairs(parents) do
    redis.call('SADD', K.unmet .. id, parent)
    if not doomed then
      redis.call('ZADD', K.dependents .. parent, NOW, id)
      redis.call('HSET', K.job .. parent, 'dp', 1)
    end
  end
  emit('job_update', id, j)
end

-- New jobs, one after the other, and what they change together when all are there.
local joined, lines, doomed = {}, {}, {}
local function enter(id, j, definition, number)
  if j.doomed then
    doomed[#doomed + 1] = id
  end
  local due = place_new(j, definition, joined)
  write_new(id, j)
  list(listed(j, 'queued'), j.cr, id)
  count(K.priorities, j.pr, 1)
  if j.gj then
    list(K.children .. j.gj, number, id)
  end
  if not j.kn then
    list(K.ttl, tonumber(j.en) + tonumber(j.qt), id)
  end
  if due then
    list(K.scheduled, due, id)
  elseif not j.kn and not j.wr then
    local line = line_of(j.ln, j.pr, j.ow or '')
    lines[line] = j
    list(line, j.en, id)
    list(K.waiting .. j.cl, tonumber(j.en) - BOOST[j.pr], id)
    count(K.lane_waiting, j.ln, 1)
  end
end
local function all_entered()
  for _, j in pairs(lines) do
    line_up(j)
  end
  write_indexes()
  for n, id in ipairs(doomed) do
    if budget > 0 then
      budget = budget - 1
      settle('k', '', id)
    else
      redis.call('ZADD', K.unsettled .. 'k' .. doomed[1] .. '.0', n, id)
      put_off('k' .. doomed[1] .. '.0')
    end
  end
end
