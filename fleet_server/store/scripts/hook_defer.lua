#!lua flags=allow-oom
-- Claimed callbacks given back untried. KEYS: hooks. ARGV: then for each: member, token, wait_ms
-- include: hooks

for i = 3, #ARGV, 3 do
  local key = K.hook .. ARGV[i]
  if redis.call('HGET', key, '_k') == ARGV[i + 1] then
    redis.call('HDEL', key, '_k')
    redis.call('ZADD', K.hooks, NOW + tonumber(ARGV[i + 2]), ARGV[i])
  end
end
return 'ok'
