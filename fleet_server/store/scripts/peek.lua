#!lua flags=no-writes
-- The next jobs of a lane by effective time. KEYS: events (for routing). ARGV: lane, limit -> ids
-- include: lanes

local lane, limit = ARGV[3], tonumber(ARGV[4])
local found = {}
for _, priority in ipairs(PRIORITIES) do
  for _, owner in ipairs(redis.call('ZRANGE', in_lane(K.heads, lane, priority), 0, limit - 1)) do
    local rows = redis.call('ZRANGE', line_of(lane, priority, owner), 0, limit - 1, 'WITHSCORES')
    for i = 1, #rows, 2 do
      found[#found + 1] = {rows[i], tonumber(rows[i + 1]) - BOOST[priority]}
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
