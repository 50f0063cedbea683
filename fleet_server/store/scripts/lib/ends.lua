-- include: jobs
-- include: hooks
-- include: inputs

local KEEP_MS = 604800000
local KEEP_COUNT = 200000
local KEEP_DEAD = 10000

-- Forgets one ended job; its outputs stay.
local function forget(id)
  local known = redis.call('HMGET', K.job .. id, 'st', 'ge', 'gj')
  redis.call('DEL', K.job .. id, K.spec .. id, K.result .. id, K.attempts .. id, K.unmet .. id)
  if known[1] then
    redis.call('ZREM', (known[3] and K.child_state or K.state) .. known[1], id)
    for generation = 1, tonumber(known[2]) do
      forget_hook(id .. '.' .. int(generation))
    end
  end
end

-- The children of a group in order, and whether all have ended.
local function children_of(id)
  local children = redis.call('ZRANGE', K.children .. id, 0, -1)
  for _, child in ipairs(children) do
    local state = redis.call('HGET', K.job .. child, 'st')
    if state == 'queued' or state == 'running' then
      return children, false
    end
  end
  return children, true
end

-- Forgets up to `limit` ended jobs past retention, oldest end first; how many. A group takes its children along, and
-- stays while one of them has not ended.
local function purge(limit, keep_ms, keep_count, keep_dead)
  local over = redis.call('ZCARD', K.ended) - keep_count
  local ids
  if over > 0 then
    ids = redis.call('ZRANGE', K.ended, 0, math.min(over, limit) - 1)
  else
    ids = redis.call('ZRANGEBYSCORE', K.ended, '-inf', '(' .. int(NOW - keep_ms), 'LIMIT', 0, limit)
  end
  local gone = 0
  for _, id in ipairs(ids) do
    local children, all = {}, true
    if redis.call('HEXISTS', K.job .. id, 'kn') == 1 then
      children, all = children_of(id)
    end
    if all then
      for _, child in ipairs(children) do
        forget(child)
      end
      forget(id)
      redis.call('DEL', K.children .. id)
      redis.call('ZREM', K.ended, id)
      redis.call('ZREM', K.dead, id)
      gone = gone + 1
    else
      redis.call('ZADD', K.ended, NOW, id)
    end
  end
  redis.call('ZREMRANGEBYRANK', K.dead, 0, -keep_dead - 1)
  return gone
end

-- All that a job waited for has succeeded: its place in line counts from now, its queue TTL from where it did.
local function ready(id, j)
  local due = tonumber(j.sc or '')
  if due and due > NOW then
    save(id, j, {wr = 'SCHEDULED'}, {'wa'})
    redis.call('ZADD', K.scheduled, due, id)
  else
    save(id, j, j.kn and {} or {tb = j.tb or j.en, en = NOW}, {'wr', 'wa'})
    if not j.kn then
      enqueue(id, j)
    end
  end
  emit('job_update', id, j)
end

-- Ended jobs leave their lanes, and for each of them up to two that are past retention are forgotten; once for all where
-- several end in one step.
local ended, left = 0, {}
local function settle_ends()
  for lane, jobs in pairs(left) do
    quit_lane(lane, jobs)
  end
  purge(2 * ended, KEEP_MS, KEEP_COUNT, KEEP_DEAD)
  ended, left = 0, {}
end

-- The end of a job, and what it brings about, these call each other. `budget` bounds how many others one step settles;
-- the rest waits in `cascade` for the next sweep, under its verdict: s the parent succeeded, c it did not, k the child's
-- group was cancelled.
local budget = 64
local finish
local function settle(verdict, parent, id)
  if verdict == 's' then
    if redis.call('SREM', K.unmet .. id, parent) == 0 then
      return
    end
    local j = load(id)
    if j and j.st == 'queued' and j.wr == 'DEPENDENCY' then
      local waits = tonumber(j.wa) - 1
      if waits > 0 then
        redis.call('HSET', K.job .. id, 'wa', waits)
      else
        ready(id, j)
      end
    end
    return
  end
  local j = load(id)
  if not j or j.st ~= 'queued' and j.st ~= 'running' then
    return
  end
  if verdict == 'k' or j.wr == 'DEPENDENCY' and redis.call('SISMEMBER', K.unmet .. id, parent) == 1 then
    finish(id, j, 'cancelled', {}, {})
  end
end
local function settle_all(key, verdict, parent)
  while budget > 0 do
    local next = redis.call('ZPOPMIN', key)
    if not next[1] then
      return
    end
    budget = budget - 1
    settle(verdict, parent, next[1])
  end
end
local function put_off(entry)
  redis.call('ZADD', K.cascade, NOW, entry)
end
local function settle_dependents(id, j, verdict)
  local key = K.dependents .. id
  settle_all(key, verdict, id)
  if redis.call('EXISTS', key) == 1 then
    local entry = verdict .. id .. '.' .. j.ge
    redis.call('RENAME', key, K.unsettled .. entry)
    put_off(entry)
  end
end
local function cancel_children(id, j)
  local entry = 'k' .. id .. '.' .. j.ge
  for n, child in ipairs(redis.call('ZRANGE', K.children .. id, 0, -1)) do
    if budget > 0 then
      budget = budget - 1
      settle('k', id, child)
    else
      redis.call('ZADD', K.unsettled .. entry, n, child)
      put_off(entry)
    end
  end
end
local function child_ended(group)
  local g = load(group)
  if not g or g.st ~= 'queued' and g.st ~= 'running' then
    return
  end
  g.kl = redis.call('HINCRBY', K.job .. group, 'kl', -1)
  if g.kl > 0 then
    return
  end
  local state, set = 'succeeded', {}
  for _, child in ipairs(redis.call('ZRANGE', K.children .. group, 0, -1)) do
    local end_of = redis.call('HMGET', K.job .. child, 'st', 'er', 'rs')
    if end_of[1] == 'failed' then
      state, set = 'failed', {er = end_of[2] or '', rs = end_of[3] or nil}
      break
    elseif end_of[1] == 'cancelled' then
      state = 'cancelled'
    end
  end
  finish(group, g, state, set, {})
end
function finish(id, j, state, set, del)
  leave(id, j)
  local dependents = j.dp
  set.st = state
  set.ee = NOW
  if j.tk then
    set.lt = j.tk
  end
  if not j.kn then
    if not j.ld and (state == 'failed' or state == 'cancelled' and j.gj) then
      set.ld = redis.call('HGET', K.lanes, j.ln)
    end
    left[j.ln] = (left[j.ln] or 0) + 1
  end
  for _, field in ipairs({'tk', 'wr', 'wa', 'cn', 'pn', 'ps', 'dp', 'tb', 'od', 'av', 'au'}) do
    del[#del + 1] = field
  end
  save(id, j, set, del)
  list(listed(j, state), j.cr, id)
  if not j.gj then
    list(K.ended, NOW, id)
    if state == 'failed' then
      list(K.dead, NOW, id)
    end
  end
  if j.cb == '1' then
    redis.call('ZADD', K.hooks, NOW, id .. '.' .. j.ge)
  end
  if j.iu then
    leave_inputs(j)
  end
  emit('job_complete', id, j)
  if dependents then
    settle_dependents(id, j, state == 'succeeded' and 's' or 'c')
  end
  if j.kn and tonumber(j.kl) > 0 then
    cancel_children(id, j)
  end
  if j.gj then
    child_ended(j.gj)
  end
  ended = ended + 1
  if not later then
    settle_ends()
  end
end
