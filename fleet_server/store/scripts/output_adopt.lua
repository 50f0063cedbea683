#!lua
-- Rows of a time before files were copied to a bucket. KEYS: outputs. ARGV: home, filenames... -> how many were adopted
-- include: outputs

local adopted = 0
for i = 4, #ARGV do
  local key = K.output .. ARGV[i]
  local row = to_table(redis.call('HGETALL', key))
  if row.s and not row.h then
    redis.call('HSET', key, 'h', ARGV[3], 'l', '1', 'k', '', 'm', '')
    redis.call('ZADD', K.output_local .. ARGV[3], row.c, ARGV[i])
    count_output('local:' .. ARGV[3], 1, tonumber(row.s))
    output_waits(ARGV[i], row.c, tonumber(row.s), ARGV[3])
    output_changed(ARGV[i])
    adopted = adopted + 1
  end
end
return adopted
