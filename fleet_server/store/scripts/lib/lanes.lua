-- include: base

local PRIORITIES = {'high', 'normal', 'low'}
local BOOST = {high = 600000, normal = 0, low = -600000}
local MAX_LANES = 512

local function in_lane(kind, lane, priority)
  return kind .. priority .. ':' .. #lane .. ':' .. lane
end

local function line_of(lane, priority, owner)
  return in_lane(K.line, lane, priority) .. ':' .. owner
end

-- Counts one more live job of the lane. Returns the lane to use: the cluster's mixed one when there are too many.
local join_lane
function join_lane(lane, definition, cluster)
  local taken = redis.call('HINCRBY', K.lane_jobs, lane, 1)
  if taken == 1 then
    if redis.call('HLEN', K.lane_jobs) > MAX_LANES and lane ~= 'mixed:' .. cluster then
      redis.call('HDEL', K.lane_jobs, lane)
      return join_lane('mixed:' .. cluster, cjson.encode({cluster = cluster}), cluster)
    end
    redis.call('HSET', K.lanes, lane, definition)
  end
  return lane
end

local function quit_lane(lane)
  if redis.call('HINCRBY', K.lane_jobs, lane, -1) <= 0 then
    redis.call('HDEL', K.lane_jobs, lane)
    redis.call('HDEL', K.lanes, lane)
    redis.call('HDEL', K.lane_urgent, lane)
    redis.call('HDEL', K.lane_deferred, lane)
  end
end

local function count(key, field, by)
  if redis.call('HINCRBY', key, field, by) <= 0 then
    redis.call('HDEL', key, field)
  end
end

-- Makes sure that a job's owner takes turns in its lane and priority. An owner who was not in line enters one turn behind the one served next
-- (`newcomer`), so that leaving and coming back gains nothing; a job given back enters level with it.
local function line_up(j, newcomer)
  local owner = j.ow or ''
  local turns = in_lane(K.turns, j.ln, j.pr)
  local heads = in_lane(K.heads, j.ln, j.pr)
  local head = redis.call('ZSCORE', heads, owner)
  if not head then
    local first = redis.call('ZRANGE', turns, 0, 0, 'WITHSCORES')
    redis.call('ZADD', turns, first[2] and tonumber(first[2]) + newcomer or 0, owner)
  end
  if not head or tonumber(j.en) < tonumber(head) then
    redis.call('ZADD', heads, j.en, owner)
  end
end

local function enqueue(id, j, newcomer)
  line_up(j, newcomer)
  redis.call('ZADD', line_of(j.ln, j.pr, j.ow or ''), j.en, id)
  redis.call('ZADD', K.waiting .. j.cl, tonumber(j.en) - BOOST[j.pr], id)
  redis.call('HINCRBY', K.lane_waiting, j.ln, 1)
end

local function dequeue(id, j)
  local owner = j.ow or ''
  local line = line_of(j.ln, j.pr, owner)
  if redis.call('ZREM', line, id) == 0 then
    return
  end
  local head = redis.call('ZRANGE', line, 0, 0, 'WITHSCORES')
  if head[1] then
    redis.call('ZADD', in_lane(K.heads, j.ln, j.pr), head[2], owner)
  else
    redis.call('ZREM', in_lane(K.heads, j.ln, j.pr), owner)
    redis.call('ZREM', in_lane(K.turns, j.ln, j.pr), owner)
  end
  redis.call('ZREM', K.waiting .. j.cl, id)
  count(K.lane_waiting, j.ln, -1)
end

-- The best head after boosts: priority, effective time, oldest raw time.
local function best_head(lane)
  local best, best_at, oldest, high
  for _, priority in ipairs(PRIORITIES) do
    local head = redis.call('ZRANGE', in_lane(K.heads, lane, priority), 0, 0, 'WITHSCORES')
    if head[1] then
      local at = tonumber(head[2])
      if not best or at - BOOST[priority] < best_at then
        best, best_at = priority, at - BOOST[priority]
      end
      if not oldest or at < oldest then
        oldest = at
      end
      high = high or priority == 'high'
    end
  end
  return best, best_at, oldest, high
end
