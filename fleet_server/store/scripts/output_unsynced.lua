#!lua flags=allow-oom
-- The bucket's copy is not as it should be, the local file is. KEYS: output. ARGV: filename -> 1 | 0: nothing to change
-- include: outputs

local row = to_table(redis.call('HGETALL', KEYS[1]))
if row.y ~= '1' or row.l ~= '1' then
  return 0
end
redis.call('HDEL', KEYS[1], 'y')
count_output('s3', -1, tonumber(row.s))
output_waits(ARGV[3], row.c, tonumber(row.s), row.h)
output_changed(ARGV[3])
return 1
