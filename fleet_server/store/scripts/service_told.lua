#!lua
-- A swarm service was seen by one of the nodes that manage it. KEYS: service_seen, events.
-- ARGV: version, hash of its content, field, value, ... -> id of the event | false: it is old news
-- include: base

local KEEP_EVENTS = 100000
local KEEP_MS = 7 * 86400 * 1000

local version, hash = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (%w+)$')
if version and (tonumber(ARGV[3]) < tonumber(version) or (ARGV[3] == version and ARGV[4] == hash)) then
  return false
end
redis.call('SET', KEYS[1], ARGV[3] .. ' ' .. ARGV[4], 'PX', int(KEEP_MS))
return redis.call('XADD', KEYS[2], 'MAXLEN', '~', KEEP_EVENTS, '*', '_t', 'service_update', '_ms', int(NOW),
  unpack(ARGV, 5))
