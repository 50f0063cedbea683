#!lua flags=no-writes
-- KEYS: events (for routing). ARGV: idle -> for each lane {id, definition, waiting, running, head priority, head effective
-- ms, oldest ms, paused, head owner, head owner's lag, whether a high job may go}
-- include: lanes

local waiting = to_table(redis.call('HGETALL', K.lane_waiting))
local running = to_table(redis.call('HGETALL', K.lane_running))
local definitions = to_table(redis.call('HGETALL', K.lanes))
local pauses = redis.call('HGETALL', K.pauses)

local function view(lane, definition)
  local cluster, job_type = kind_of_lane(definition)
  local held = held_back(pauses, cluster, job_type)
  local heads = heads_of(lane, held)
  local stopped = 0
  if held and not heads[1] then
    heads = heads_of(lane)
    stopped = heads[1] and 1 or 0
  end
  local head = heads[1]
  if not head then
    return '', '', '', 0, '', 0, 0
  end
  local oldest, high = head[3], 0
  for _, other in ipairs(heads) do
    oldest = math.min(oldest, other[3])
    high = other[1] == 'high' and 1 or high
  end
  local owner, lag = likely_turn(in_lane(K.turns, lane, head[1]), cluster)
  return head[1], int(head[2]), int(oldest), stopped, owner, lag, high
end

local out = {}
for lane, definition in pairs(definitions) do
  if waiting[lane] or ARGV[3] == '1' then
    local priority, effective, oldest, stopped, owner, lag, high = view(lane, definition)
    out[#out + 1] = {lane, definition, waiting[lane] or '0', running[lane] or '0', priority, effective, oldest,
      stopped, owner, tostring(lag), high}
  end
end
return out
