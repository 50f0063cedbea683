#!lua
-- A join token. KEYS: join. ARGV: ms -> 1
-- include: base

redis.call('HSET', KEYS[1], 'made', int(NOW))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
