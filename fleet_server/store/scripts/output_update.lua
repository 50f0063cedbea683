#!lua flags=allow-oom
-- KEYS: output. ARGV: record -> fields | false

if redis.call('EXISTS', KEYS[1]) == 0 then
  return false
end
redis.call('HSET', KEYS[1], 'r', ARGV[3])
return redis.call('HGETALL', KEYS[1])
