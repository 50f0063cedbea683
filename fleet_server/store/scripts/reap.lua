#!lua flags=allow-oom
-- One bounded sweep. KEYS: events (for routing). ARGV: limit, hold, margin_ms, backoff_ms, avoid_ms, single, errors lost,
-- poison, timeout, ttl, the replica that sweeps ('': a fleet that is not watched), its boot, life_ms, grace_ms, share,
-- least, window_ms, freeze_ms, then lanes that only one node serves
-- -> {more, {requeued...}, {failed...}, {promoted...}, missing, extended}
-- include: attempts
-- include: watch

local limit, hold, margin, backoff = tonumber(ARGV[3]), ARGV[4] == '1', tonumber(ARGV[5]), tonumber(ARGV[6])
local avoid, single = tonumber(ARGV[7]), ARGV[8] == '1'
local lost_err, poison_err, timeout_err, ttl_err = ARGV[9], ARGV[10], ARGV[11], ARGV[12]
local single_lanes = {}
for i = 21, #ARGV do
  single_lanes[ARGV[i]] = true
end
local more = 0
local moved = {queued = {}, failed = {}, promoted = {}}

local function keep(kind, id, j)
  local list = moved[kind]
  list[#list + 1] = flat_of(id, j)
end

-- Calls `act` for each job of a zset that is due. An entry whose job is not in the state that the zset stands for is
-- dropped, so that it can never hide the rest.
local function sweep(key, till, state, act)
  local ids = redis.call('ZRANGEBYSCORE', key, '-inf', int(till), 'LIMIT', 0, limit)
  if #ids == limit then
    more = 1
  end
  for _, id in ipairs(ids) do
    local j = load(id)
    if j and j.st == state then
      act(id, j)
    else
      redis.call('ZREM', key, id)
    end
  end
end

local function overdue(id, j)
  remember_own(id, j, timeout_err)
  keep(attempt_failed(id, j, true, backoff, avoid, timeout_err, 'TIMEOUT'), id, j)
end

-- What ends left to do, the oldest first.
local function cascade()
  budget = limit
  local entry = redis.call('ZRANGE', K.cascade, 0, 0)[1]
  while entry and budget > 0 do
    local verdict, parent = string.match(entry, '^(.)(.*)%.%d+$')
    settle_all(K.unsettled .. entry, verdict, parent)
    if redis.call('EXISTS', K.unsettled .. entry) == 0 then
      redis.call('ZREM', K.cascade, entry)
    end
    entry = redis.call('ZRANGE', K.cascade, 0, 0)[1]
  end
  if entry then
    more = 1
  end
end

local missing, extended = 0, 0
local spared = function() return false end
if ARGV[13] ~= '' then
  live(ARGV[13], ARGV[14], tonumber(ARGV[15]))
  missing = mass_loss(tonumber(ARGV[17]), tonumber(ARGV[18]), tonumber(ARGV[19]), tonumber(ARGV[20]))
  spared = function(id, j)
    local extends = extend(id, j, tonumber(ARGV[16]), margin)
    extended = extended + (extends and 1 or 0)
    return extends
  end
end

if not hold and missing == 0 then
  sweep(K.leases, NOW, 'running', function(id, j)
    if spared(id, j) then
      return
    end
    if j.od == 'T' then
      overdue(id, j)
    elseif j.od == 'R' then
      give_back(id, j, {}, {})
      keep('queued', id, j)
    else
      keep(lost(id, j, avoid, lost_err, poison_err, single or single_lanes[j.ln]), id, j)
    end
  end)
  sweep(K.deadlines, NOW - margin, 'running', function(id, j)
    if spared(id, j) then
      return
    end
    if j.xc then
      -- It may still run: its lease is renewed no more, and when that has ended it surely does not.
      redis.call('HSET', K.job .. id, 'od', 'T')
      redis.call('ZREM', K.deadlines, id)
    else
      overdue(id, j)
    end
  end)
end
sweep(K.ttl, NOW, 'queued', function(id, j)
  finish(id, j, 'failed', {er = ttl_err, rs = 'QUEUE_TTL_EXPIRED'}, {})
  keep('failed', id, j)
end)
sweep(K.scheduled, NOW, 'queued', function(id, j)
  redis.call('ZREM', K.scheduled, id)
  save(id, j, {}, {'wr'})
  if not j.kn then
    enqueue(id, j)
  end
  emit('job_update', id, j)
  keep('promoted', id, j)
end)
cascade()
return {more, moved.queued, moved.failed, moved.promoted, missing, extended}
