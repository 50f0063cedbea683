#!lua flags=allow-oom
-- KEYS: totals. ARGV: number, limit, epoch for an index that has none yet
-- -> epoch, floor, then for each row changed after `number`, in order: filename, its number, fields | false: deleted
-- include: base

redis.call('HSETNX', KEYS[1], 'epoch', ARGV[5])
local known = redis.call('HMGET', KEYS[1], 'epoch', 'floor', 'changes')
local out = {known[1], known[2] or '0', known[3] or '0'}
local rows = redis.call('ZRANGE', K.output_changes, '(' .. ARGV[3], '+inf', 'BYSCORE', 'LIMIT', 0, ARGV[4], 'WITHSCORES')
for i = 1, #rows, 2 do
  local flat = redis.call('HGETALL', K.output .. rows[i])
  out[#out + 1] = rows[i]
  out[#out + 1] = rows[i + 1]
  out[#out + 1] = #flat > 0 and flat
end
return out
