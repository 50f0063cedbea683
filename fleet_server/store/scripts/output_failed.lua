#!lua
-- A file could not be copied. KEYS: output. ARGV: filename, reason, detail -> tries so far | 0: it does not wait any more
-- include: outputs

local row = to_table(redis.call('HGETALL', KEYS[1]))
if not row.s or row.y == '1' then
  return 0
end
redis.call('HSET', KEYS[1], 'fr', ARGV[4], 'fd', ARGV[5])
redis.call('ZADD', K.output_failed, row.c, ARGV[3])
return redis.call('HINCRBY', KEYS[1], 'fa', 1)
