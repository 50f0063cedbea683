-- include: base
-- include: owners
-- include: indexes

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

local function quit_lane(lane, jobs)
  if redis.call('HINCRBY', K.lane_jobs, lane, -jobs) <= 0 then
    redis.call('HDEL', K.lane_jobs, lane)
    redis.call('HDEL', K.lanes, lane)
    redis.call('HDEL', K.lane_urgent, lane)
  end
end

-- Makes sure that a job's owner takes turns in its lane and priority, and in its cluster.
local function line_up(j)
  local owner = j.ow or ''
  local heads = in_lane(K.heads, j.ln, j.pr)
  local head = redis.call('ZSCORE', heads, owner)
  if not head then
    redis.call('ZADD', in_lane(K.turns, j.ln, j.pr), enter_cluster(j.cl, owner), owner)
  end
  if not head or tonumber(j.en) < tonumber(head) then
    redis.call('ZADD', heads, j.en, owner)
  end
end

local function enqueue(id, j)
  line_up(j)
  redis.call('ZADD', line_of(j.ln, j.pr, j.ow or ''), j.en, id)
  list(K.waiting .. j.cl, tonumber(j.en) - BOOST[j.pr], id)
  count(K.lane_waiting, j.ln, 1)
end

-- What else is kept of a job that has left its line.
local function off_line(id, j)
  unlist(K.waiting .. j.cl, id)
  count(K.lane_waiting, j.ln, -1)
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
    leave_cluster(j.cl, owner)
  end
  off_line(id, j)
end

-- The priorities in which jobs wait that are not `held` back, by their oldest jobs after boosts: each {priority,
-- effective time, raw time}. Then whether `high` is among them.
local function heads_of(lane, held)
  local found, high = {}, false
  for n, priority in ipairs(PRIORITIES) do
    if not held or not held[priority] then
      local head = redis.call('ZRANGE', in_lane(K.heads, lane, priority), 0, 0, 'WITHSCORES')
      if head[1] then
        local at = tonumber(head[2])
        found[#found + 1] = {priority, at - BOOST[priority], at, n}
        high = high or priority == 'high'
      end
    end
  end
  if found[2] then
    table.sort(found, function(a, b)
      return a[2] < b[2] or a[2] == b[2] and a[4] < b[4]
    end)
  end
  return found, high
end

-- What a lane's definition says: its cluster and its job type, '' for a mixed lane.
local function kind_of_lane(definition)
  return string.match(definition, '"cluster":"([^"]*)"') or '', string.match(definition, '"job_type":"([^"]*)"') or ''
end

-- The priorities of a cluster and a type that are paused, nil for none. `pauses` is the whole hash, flat.
local function held_back(pauses, cluster, job_type)
  local held
  for i = 1, #pauses, 2 do
    local of_cluster, of_type, priority = string.match(pauses[i], '^(%Z*)%z(%Z*)%z(%Z*)$')
    if (of_cluster == '' or of_cluster == cluster) and (of_type == '' or of_type == job_type) then
      held = held or {}
      for _, one in ipairs(priority == '' and PRIORITIES or {priority}) do
        held[one] = true
      end
    end
  end
  return held
end
