#!lua flags=allow-oom
-- Gives jobs of one lane to a node's session, one for each token. Repeatable by token.
-- KEYS: held, node. ARGV: lane, node id, session, lease_ms, job id or '', avoid, token, ...
-- -> for each token {fields (joined where they can be), spec} | false
-- include: jobs

local lane, node, session, lease, wanted, avoid = ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7], ARGV[8] == '1'
local pauses = redis.call('HGETALL', K.pauses)
local definition = redis.call('HGET', K.lanes, lane)
local cluster, held
if definition then
  local job_type
  cluster, job_type = kind_of_lane(definition)
  held = held_back(pauses, cluster, job_type)
end

local function avoided(id)
  local known = redis.call('HMGET', K.job .. id, 'av', 'au')
  return known[1] == node and tonumber(known[2]) > NOW
end

-- The first job of a priority that this node should take: the first in line, or of the first `budget` in line one that
-- it does not avoid. Then what is left of the budget.
local function next_of(priority, budget)
  local turns = in_lane(K.turns, lane, priority)
  local owners = {whose_turn(turns, cluster)}
  if not avoid then
    return redis.call('ZRANGE', line_of(lane, priority, owners[1]), 0, 0)[1]
  end
  for _, owner in ipairs(redis.call('ZRANGE', turns, 0, budget - 1)) do
    if owner ~= owners[1] then
      owners[#owners + 1] = owner
    end
  end
  for _, owner in ipairs(owners) do
    for _, id in ipairs(redis.call('ZRANGE', line_of(lane, priority, owner), 0, budget - 1)) do
      if not avoided(id) then
        return id
      end
      budget = budget - 1
      if budget == 0 then
        return nil, 0
      end
    end
  end
  return nil, budget
end

-- What comes next, and whether a high one is put before older ones.
local was_urgent = redis.call('HEXISTS', K.lane_urgent, lane) == 1
local urgent = was_urgent
local function pick()
  local heads, high = heads_of(lane, held)
  local forced = high and not urgent
  if forced then
    for n, head in ipairs(heads) do
      if head[1] == 'high' then
        table.insert(heads, 1, table.remove(heads, n))
        break
      end
    end
  end
  local id, budget = nil, 8
  for _, head in ipairs(heads) do
    id, budget = next_of(head[1], budget)
    if id then
      return id, forced and head[1] == 'high'
    elseif budget == 0 then
      break
    end
  end
  return nil
end

local function may_go(j)
  if not j or j.kn or j.st ~= 'queued' or j.wr or j.ln ~= lane then
    return false
  end
  local stopped = #pauses > 0 and held_back(pauses, j.cl, j.ty)
  return not stopped or not stopped[j.pr]
end

local known = redis.call('HMGET', KEYS[2], 'session', 'cordoned')
local nothing = not definition or known[1] and known[1] ~= session or known[2] == '1'

-- The first `most` jobs of the lane, out of their line already, where all of them are of one owner and one priority and
-- any of them may go: {id, job} of each. Else none.
local function first_together(most)
  if most < 2 or nothing or wanted ~= '' or avoid or #pauses > 0 then
    return {}
  end
  local heads, high = heads_of(lane)
  if #heads ~= 1 or high then
    return {}
  end
  local priority = heads[1][1]
  local turns, line_heads = in_lane(K.turns, lane, priority), in_lane(K.heads, lane, priority)
  local owners = redis.call('ZRANGE', turns, 0, 1)
  if owners[2] then
    return {}
  end
  local owner = owners[1]
  local line = line_of(lane, priority, owner)
  local rows = redis.call('ZRANGE', line, 0, most, 'WITHSCORES')
  local found, ids = {}, {}
  for n = 1, math.min(most, #rows / 2) do
    ids[n] = rows[2 * n - 1]
    local j = load(ids[n])
    if not may_go(j) then
      return {}
    end
    found[n] = {ids[n], j}
  end
  redis.call('ZADD', turns, 'XX', charge(cluster, owner, #ids), owner)
  redis.call('ZREM', line, unpack(ids))
  local following = rows[2 * #ids + 2]
  if following then
    redis.call('ZADD', line_heads, following, owner)
  else
    redis.call('ZREM', line_heads, owner)
    redis.call('ZREM', turns, owner)
    leave_cluster(cluster, owner)
  end
  return found
end

local held_now = {}
local function take(id, j, token, forced, gone)
  local owner = j.ow or ''
  if not gone then
    redis.call('ZADD', in_lane(K.turns, lane, j.pr), 'XX', charge(j.cl, owner, 1), owner)
  end
  leave(id, j, gone)
  urgent = forced
  save(id, j, {st = 'running', tk = token, no = node, se = session, at = tonumber(j.at or 0) + 1},
    {'lt', 'pn', 'ps', 'av', 'au'})
  list(listed(j, 'running'), j.cr, id)
  list(K.leases, lease_end(lease, j.xc), id)
  held_now[#held_now + 1] = token
  held_now[#held_now + 1] = id
  count(K.lane_running, lane, 1)
end

local out, ids, places = {}, {}, {}
local function give(n, id, j)
  out[n] = {joined_of(id, j) or flat_of(id, j)}
  ids[#ids + 1] = K.spec .. id
  places[#places + 1] = n
end

local holds, missing = {}, 0
for n, id in ipairs(redis.call('HMGET', KEYS[1], unpack(ARGV, 9))) do
  if holds[ARGV[n + 8]] == nil then
    holds[ARGV[n + 8]] = id
    missing = missing + (id and 0 or 1)
  end
end
gather_indexes()
local together, used = nil, 0
for n = 1, #ARGV - 8 do
  local mine = holds[ARGV[n + 8]]
  out[n] = false
  if mine then
    local j = load(mine)
    if j then
      give(n, mine, j)
    end
  elseif not nothing then
    together = together or first_together(missing)
    used = used + 1
    local id, forced, gone, j = wanted, false, false, nil
    if together[used] then
      id, j, gone = together[used][1], together[used][2], true
    elseif wanted == '' then
      id, forced = pick()
    end
    j = j or id and load(id)
    if may_go(j) then
      take(id, j, ARGV[n + 8], forced, gone)
      holds[ARGV[n + 8]] = id
      give(n, id, j)
    else
      nothing = true
    end
  end
end
write_indexes()
if #held_now > 0 then
  redis.call('HSET', KEYS[1], unpack(held_now))
end
if #ids > 0 then
  for i, spec in ipairs(redis.call('MGET', unpack(ids))) do
    out[places[i]][2] = spec
  end
end
if urgent and not was_urgent then
  redis.call('HSET', K.lane_urgent, lane, 1)
elseif was_urgent and not urgent then
  redis.call('HDEL', K.lane_urgent, lane)
end
return out
