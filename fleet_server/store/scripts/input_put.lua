#!lua
-- KEYS: input. ARGV: expire_ms, filename, content type, size, sha256, home, key -> 1

redis.call(
  'HSET', KEYS[1], 'e', ARGV[3], 'f', ARGV[4], 't', ARGV[5], 's', ARGV[6], 'd', ARGV[7], 'h', ARGV[8], 'k', ARGV[9]
)
if redis.call('HEXISTS', KEYS[1], 'n') == 0 then
  redis.call('PEXPIREAT', KEYS[1], ARGV[3])
end
return 1
