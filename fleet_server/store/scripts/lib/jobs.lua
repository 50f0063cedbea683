-- include: lanes
-- include: hooks

-- What hardly ever changes is two fields, joined by NUL (see records.py): fewer fields make hashes and
-- events half as dear, and two stay below 64 bytes, beyond which a server's defaults give up the compact form.
-- Further fields beyond records.FIELDS:
--   ra  1 once an attempt of this generation started: the queue TTL is over
--   cn  1 while the loss of the present attempt would count
--   lx  nodes of the counted losses, with commas
--   pn, ps  node and start of the attempt that was lost, for a late Complete
--   ft  token of the attempt that failed last
--   ld  definition of the lane, where the lane itself may be gone or is a mixed one
--   ro  operation id of the last retry

local KEEP_MS = 604800000
local KEEP_COUNT = 200000
local KEEP_DEAD = 10000
local KEEP_ATTEMPTS = 20
local KEEP_EVENTS = 100000
local POISON_LOSSES = 3
local KIND = '^(%Z*)%z(%Z*)%z(%Z*)%z(.*)$'
local LIMITS = '^(%Z*)%z(%Z*)%z(%Z*)%z(%Z*)%z(%Z*)%z(%Z*)$'
local HIDDEN = {ld = true, ty = true, pr = true, cl = true, ln = true, mr = true, to = true, qt = true, cr = true, sc = true,
  cb = true}

local function load(id)
  local flat = redis.call('HGETALL', K.job .. id)
  if #flat == 0 then
    return nil
  end
  local j = to_table(flat)
  j.ty, j.pr, j.cl, j.ln = string.match(j.ki, KIND)
  j.mr, j.to, j.qt, j.cr, j.sc, j.cb = string.match(j.li, LIMITS)
  return j
end

local function kind_of(j)
  return table.concat({j.ty, j.pr, j.cl, j.ln}, '\0')
end

local function limits_of(j)
  return table.concat({j.mr, j.to, j.qt, j.cr, j.sc or '', j.cb or ''}, '\0')
end

local function flat_of(id, j)
  local flat = {'id', id}
  for field, value in pairs(j) do
    if not HIDDEN[field] then
      flat[#flat + 1] = field
      flat[#flat + 1] = value
    end
  end
  return flat
end

local function emit(kind, id, j)
  redis.call('XADD', K.events, 'MAXLEN', '~', KEEP_EVENTS, '*', '_t', kind, '_ms', int(NOW), unpack(flat_of(id, j)))
end

-- Writes the changes of one step, and counts the version. `j` is afterwards what the hash holds.
local function save(id, j, set, del)
  set.ve = tonumber(j.ve) + 1
  set.up = NOW
  local args = {}
  for field, value in pairs(set) do
    j[field] = type(value) == 'number' and int(value) or value
    args[#args + 1] = field
    args[#args + 1] = j[field]
  end
  redis.call('HSET', K.job .. id, unpack(args))
  local gone = {}
  for _, field in ipairs(del) do
    if j[field] and not set[field] then
      j[field] = nil
      gone[#gone + 1] = field
    end
  end
  if #gone > 0 then
    redis.call('HDEL', K.job .. id, unpack(gone))
  end
end

local function remember(id, row)
  redis.call('RPUSH', K.attempts .. id, row)
  redis.call('LTRIM', K.attempts .. id, -KEEP_ATTEMPTS, -1)
end

-- An attempt that the store ended by itself, spelled for records.AttemptRow.
local function remember_own(id, j, err)
  remember(id, 'L' .. table.concat({j.ge, j.at, j.no or '', j.sa or '', int(NOW), err}, '\0'))
end

-- Takes a live job out of every index that its state put it in.
local function leave(id, j)
  if j.st == 'queued' then
    if j.wr then
      redis.call('ZREM', K.scheduled, id)
    else
      dequeue(id, j)
    end
    redis.call('ZREM', K.ttl, id)
    count(K.priorities, j.pr, -1)
  else
    redis.call('ZREM', K.leases, id)
    redis.call('ZREM', K.deadlines, id)
    redis.call('HDEL', K.held .. j.no, j.tk)
    count(K.lane_running, j.ln, -1)
  end
  redis.call('ZREM', K.state .. j.st, id)
end

-- Puts a job whose hash says queued into the indexes; `due` is the time before which it is not in line.
local function arrive(id, j, due, newcomer)
  redis.call('ZADD', K.state .. 'queued', j.cr, id)
  redis.call('HINCRBY', K.priorities, j.pr, 1)
  if due then
    redis.call('ZADD', K.scheduled, due, id)
  else
    enqueue(id, j, newcomer)
  end
  if not j.ra then
    redis.call('ZADD', K.ttl, tonumber(j.en) + tonumber(j.qt), id)
  end
end

local function purge(limit, keep_ms, keep_count, keep_dead)
  local over = redis.call('ZCARD', K.ended) - keep_count
  local ids
  if over > 0 then
    ids = redis.call('ZRANGE', K.ended, 0, math.min(over, limit) - 1)
  else
    ids = redis.call('ZRANGEBYSCORE', K.ended, '-inf', '(' .. int(NOW - keep_ms), 'LIMIT', 0, limit)
  end
  for _, id in ipairs(ids) do
    local known = redis.call('HMGET', K.job .. id, 'st', 'ge')
    redis.call('DEL', K.job .. id, K.spec .. id, K.result .. id, K.attempts .. id)
    redis.call('ZREM', K.ended, id)
    redis.call('ZREM', K.dead, id)
    if known[1] then
      redis.call('ZREM', K.state .. known[1], id)
      for generation = 1, tonumber(known[2]) do
        -- The row of its callback, and the callback's own record.
        forget_hook(id .. '.' .. int(generation))
      end
    end
  end
  redis.call('ZREMRANGEBYRANK', K.dead, 0, -keep_dead - 1)
  return #ids
end

-- Ends a live job, for good in this generation.
local function finish(id, j, state, set, del)
  leave(id, j)
  set.st = state
  set.ee = NOW
  if j.tk then
    set.lt = j.tk
  end
  if state == 'failed' and not j.ld then
    set.ld = redis.call('HGET', K.lanes, j.ln)
  end
  for _, field in ipairs({'tk', 'wr', 'cn', 'pn', 'ps'}) do
    del[#del + 1] = field
  end
  quit_lane(j.ln)
  save(id, j, set, del)
  redis.call('ZADD', K.state .. state, j.cr, id)
  redis.call('ZADD', K.ended, NOW, id)
  if state == 'failed' then
    redis.call('ZADD', K.dead, NOW, id)
  end
  if j.cb == '1' then
    redis.call('ZADD', K.hooks, NOW, id .. '.' .. j.ge)
  end
  emit('job_complete', id, j)
  purge(2, KEEP_MS, KEEP_COUNT, KEEP_DEAD)
end

-- Puts a running job back: at once, to its old place in line, or not before `due`.
local function requeue(id, j, due, set, del)
  leave(id, j)
  set.st = 'queued'
  if due then
    set.wr = 'BACKOFF'
  end
  for _, field in ipairs({'tk', 'no', 'se', 'pg', 'sp', 'ss', 'sa', 'cn'}) do
    del[#del + 1] = field
  end
  save(id, j, set, del)
  arrive(id, j, due, 0)
  emit('job_update', id, j)
end

-- The present attempt failed: again after a while, or for good. Returns the state that the job is in now.
local function attempt_failed(id, j, retryable, backoff, err)
  local failures = tonumber(j.at or 0) - tonumber(j.lo or 0)
  if retryable and failures <= tonumber(j.mr or 0) then
    requeue(id, j, backoff > 0 and NOW + backoff or nil, {ft = j.tk}, {'lt', 'pn', 'ps'})
    return 'queued'
  end
  finish(id, j, 'failed', {er = err, ft = j.tk}, {})
  return 'failed'
end

-- The node or its lease is lost. A loss counts once the engine had started; the third is poison if two nodes saw it
-- (one is enough where `single`), since then the job is the likelier cause.
local function lost(id, j, err, poison_err, single)
  local set = {lt = j.tk, pn = j.no}
  local del = {'ft'}
  if j.sa then
    set.ps = j.sa
  end
  if not j.cn then
    set.at = tonumber(j.at) - 1
    requeue(id, j, nil, set, del)
    return 'queued'
  end
  remember_own(id, j, err)
  set.lo = tonumber(j.lo or 0) + 1
  local nodes = j.lx and ',' .. j.lx .. ',' or ','
  if not string.find(nodes, ',' .. j.no .. ',', 1, true) then
    set.lx = j.lx and j.lx .. ',' .. j.no or j.no
  end
  local several = string.find(set.lx or j.lx, ',', 1, true)
  if set.lo >= POISON_LOSSES and (several or single) then
    finish(id, j, 'failed', {er = poison_err, lo = set.lo, lx = set.lx}, {})
    return 'failed'
  end
  requeue(id, j, nil, set, del)
  return 'queued'
end
