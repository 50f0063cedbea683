#!lua flags=no-writes
-- KEYS: events (for routing). ARGV: idle -> for each lane {id, definition, waiting, running, head priority, head effective ms, oldest ms, deferred ms}
-- include: lanes

local waiting = to_table(redis.call('HGETALL', K.lane_waiting))
local running = to_table(redis.call('HGETALL', K.lane_running))
local definitions = to_table(redis.call('HGETALL', K.lanes))
local deferred = to_table(redis.call('HGETALL', K.lane_deferred))
local out = {}
for lane, definition in pairs(definitions) do
  if waiting[lane] or ARGV[3] == '1' then
    local priority, effective, oldest = best_head(lane)
    out[#out + 1] = {lane, definition, waiting[lane] or '0', running[lane] or '0', priority or '',
      effective and int(effective) or '', oldest and int(oldest) or '', deferred[lane] or ''}
  end
end
return out
