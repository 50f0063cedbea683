#!lua flags=allow-oom
-- KEYS: output. ARGV: filename, field, value -> fields | false
-- include: outputs

if redis.call('EXISTS', KEYS[1]) == 0 then
  return false
end
redis.call('HSET', KEYS[1], ARGV[4], ARGV[5])
output_changed(ARGV[3])
return redis.call('HGETALL', KEYS[1])
