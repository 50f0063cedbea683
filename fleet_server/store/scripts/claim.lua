#!lua flags=allow-oom
-- Gives one job of a lane to a node's session. Repeatable by token.
-- KEYS: held, node. ARGV: lane, node id, session, token, lease_ms, job id or ''
-- -> {fields, spec} | false
-- include: jobs

local lane, node, session, token = ARGV[3], ARGV[4], ARGV[5], ARGV[6]

local function given(id, j)
  return {flat_of(id, j), redis.call('GET', K.spec .. id)}
end

local mine = redis.call('HGET', KEYS[1], token)
if mine then
  local j = load(mine)
  return j and given(mine, j) or false
end
local current = redis.call('HGET', KEYS[2], 'session')
if current and current ~= session then
  return false
end

local forced = false
local id = ARGV[8]
if id == '' then
  local priority, _, _, high = best_head(lane)
  if not priority then
    return false
  end
  if high and redis.call('HEXISTS', K.lane_urgent, lane) == 0 then
    forced, priority = true, 'high'
  end
  local owner = redis.call('ZRANGE', in_lane(K.turns, lane, priority), 0, 0)[1]
  id = redis.call('ZRANGE', line_of(lane, priority, owner), 0, 0)[1]
end
local j = load(id)
if not j or j.st ~= 'queued' or j.wr or j.ln ~= lane then
  return false
end

leave(id, j)
redis.call('ZADD', in_lane(K.turns, lane, j.pr), 'XX', 'INCR', 1, j.ow or '')
if forced then
  redis.call('HSET', K.lane_urgent, lane, 1)
else
  redis.call('HDEL', K.lane_urgent, lane)
end
redis.call('HDEL', K.lane_deferred, lane)
save(id, j, {st = 'running', tk = token, no = node, se = session, at = tonumber(j.at or 0) + 1}, {'lt', 'pn', 'ps'})
redis.call('ZADD', K.state .. 'running', j.cr, id)
redis.call('ZADD', K.leases, NOW + tonumber(ARGV[7]), id)
redis.call('HSET', KEYS[1], token, id)
redis.call('HINCRBY', K.lane_running, lane, 1)
return given(id, j)
