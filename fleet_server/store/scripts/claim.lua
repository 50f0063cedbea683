#!lua flags=allow-oom
-- Gives jobs of one lane to a node's session, one for each token. Repeatable by token.
-- KEYS: held, node. ARGV: lane, node id, session, lease_ms, job id or '', avoid, token, ...
-- -> for each token {fields, spec} | false
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

local function given(id, j)
  return {flat_of(id, j), redis.call('GET', K.spec .. id)}
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

local function take(id, j, token, forced)
  local owner = j.ow or ''
  redis.call('ZADD', in_lane(K.turns, lane, j.pr), 'XX', charge(j.cl, owner), owner)
  leave(id, j)
  urgent = forced
  save(id, j, {st = 'running', tk = token, no = node, se = session, at = tonumber(j.at or 0) + 1},
    {'lt', 'pn', 'ps', 'av', 'au'})
  redis.call('ZADD', listed(j, 'running'), j.cr, id)
  redis.call('ZADD', K.leases, lease_end(lease, j.xc), id)
  redis.call('HSET', KEYS[1], token, id)
  redis.call('HINCRBY', K.lane_running, lane, 1)
end

local known = redis.call('HMGET', KEYS[2], 'session', 'cordoned')
local nothing = not definition or known[1] and known[1] ~= session or known[2] == '1'
local out = {}
for i = 9, #ARGV do
  local mine = redis.call('HGET', KEYS[1], ARGV[i])
  out[i - 8] = false
  if mine then
    local j = load(mine)
    out[i - 8] = j and given(mine, j) or false
  elseif not nothing then
    local id, forced = wanted, false
    if wanted == '' then
      id, forced = pick()
    end
    local j = id and load(id)
    if may_go(j) then
      take(id, j, ARGV[i], forced)
      out[i - 8] = given(id, j)
    else
      nothing = true
    end
  end
end
if urgent and not was_urgent then
  redis.call('HSET', K.lane_urgent, lane, 1)
elseif was_urgent and not urgent then
  redis.call('HDEL', K.lane_urgent, lane)
end
return out
