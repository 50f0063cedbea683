#!lua flags=allow-oom
-- One bounded sweep. KEYS: events (for routing). ARGV: limit, hold, margin_ms, backoff_ms, single, errors lost, poison, timeout, ttl, then lanes that
-- only one node serves -> {more, {requeued...}, {failed...}, {promoted...}}
-- include: jobs

local limit, hold, margin, backoff = tonumber(ARGV[3]), ARGV[4] == '1', tonumber(ARGV[5]), tonumber(ARGV[6])
local single = ARGV[7] == '1'
local lost_err, poison_err, timeout_err, ttl_err = ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local single_lanes = {}
for i = 12, #ARGV do
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

if not hold then
  sweep(K.leases, NOW, 'running', function(id, j)
    keep(lost(id, j, lost_err, poison_err, single or single_lanes[j.ln]), id, j)
  end)
  sweep(K.deadlines, NOW - margin, 'running', function(id, j)
    remember_own(id, j, timeout_err)
    keep(attempt_failed(id, j, true, backoff, timeout_err), id, j)
  end)
end
sweep(K.ttl, NOW, 'queued', function(id, j)
  finish(id, j, 'failed', {er = ttl_err}, {})
  keep('failed', id, j)
end)
sweep(K.scheduled, NOW, 'queued', function(id, j)
  redis.call('ZREM', K.scheduled, id)
  save(id, j, {}, {'wr'})
  enqueue(id, j, 1)
  emit('job_update', id, j)
  keep('promoted', id, j)
end)
return {more, moved.queued, moved.failed, moved.promoted}
