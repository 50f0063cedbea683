#!lua flags=no-writes
-- The next jobs of a lane by effective time, less what is paused. KEYS: events (for routing). ARGV: lane, limit -> ids
-- include: jobs

local lane, limit = ARGV[3], tonumber(ARGV[4])
local pauses = redis.call('HGETALL', K.pauses)
local function may_go(id, priority)
  if #pauses == 0 then
    return true
  end
  local job_type, _, cluster = string.match(redis.call('HGET', K.job .. id, 'ki') or '', KIND)
  local held = held_back(pauses, cluster, job_type)
  return not held or not held[priority]
end

local found = {}
for _, priority in ipairs(PRIORITIES) do
  for _, owner in ipairs(redis.call('ZRANGE', in_lane(K.heads, lane, priority), 0, limit - 1)) do
    local rows = redis.call('ZRANGE', line_of(lane, priority, owner), 0, limit - 1, 'WITHSCORES')
    for i = 1, #rows, 2 do
      if may_go(rows[i], priority) then
        found[#found + 1] = {rows[i], tonumber(rows[i + 1]) - BOOST[priority]}
      end
    end
  end
end
table.sort(found, function(a, b)
  return a[2] < b[2] or a[2] == b[2] and a[1] < b[1]
end)
local out = {}
for i = 1, math.min(limit, #found) do
  out[i] = found[i][1]
end
return out
