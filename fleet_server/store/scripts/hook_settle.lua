#!lua flags=allow-oom
-- What a try came to. KEYS: hooks. ARGV: member, token, state, wait_ms, tries, log -> 'ok' | 'already' | 'refused'
-- include: hooks

local member, token, state = ARGV[3], ARGV[4], ARGV[5]
local key = K.hook .. member
local known = redis.call('HMGET', key, '_k', '_l', '_r')
if known[2] == token then
  return 'already'
end
if known[1] ~= token then
  return 'refused'
end

redis.call('HDEL', key, '_k', '_r', '_e')
redis.call('HSET', key, '_s', state, '_l', token, '_t', ARGV[7], '_a', ARGV[8])
if state == 'delivered' or (state == 'failed' and not known[3]) then
  redis.call('HSET', key, '_e', int(NOW))
  redis.call('ZREM', K.hooks, member)
elseif known[3] then
  redis.call('HSET', key, '_s', 'pending', '_t', 0)
  redis.call('ZADD', K.hooks, NOW, member)
else
  redis.call('ZADD', K.hooks, NOW + tonumber(ARGV[6]), member)
end
return 'ok'
