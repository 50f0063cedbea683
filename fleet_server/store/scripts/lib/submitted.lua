-- include: jobs

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

local function place(id, j)
  local rank = redis.call('ZRANK', K.waiting .. j.cl, id)
  return rank and rank + 1 or false
end

-- Gives a new job its lane and times; returns the time before which it is not in line.
local function place_new(j, definition)
  local lane = join_lane(j.ln, definition, j.cl)
  if lane ~= j.ln then
    j.ld = definition
    j.ln = lane
  end
  local due = j.sc and tonumber(j.sc) > NOW and j.sc or nil
  j.st, j.ge, j.ve = 'queued', '1', '1'
  j.cr, j.up, j.en = int(NOW), int(NOW), due or int(NOW)
  if due then
    j.wr = 'SCHEDULED'
  end
  return due
end

local function write_new(id, j)
  j.ki, j.li = kind_of(j), limits_of(j)
  local args = {'st', j.st, 'ge', j.ge, 've', j.ve, 'up', j.up, 'en', j.en, 'ki', j.ki, 'li', j.li}
  for _, field in ipairs({'mo', 'ow', 'wr', 'ld'}) do
    if j[field] then
      args[#args + 1] = field
      args[#args + 1] = j[field]
    end
  end
  redis.call('HSET', K.job .. id, unpack(args))
  emit('job_update', id, j)
end
