#!lua flags=allow-oom
-- KEYS: output. ARGV: filename, '1' where the bucket may hold it without our knowing -> fields | false
-- include: outputs

local TOMBSTONES = 10000

local flat = redis.call('HGETALL', KEYS[1])
if #flat == 0 then
  return false
end
local row = to_table(flat)
local name = ARGV[3]
output_settled(name, row)
output_not_local(name, row)
if row.y == '1' then
  count_output('s3', -1, tonumber(row.s))
end
redis.call('DEL', KEYS[1])
redis.call('ZREM', K.outputs, name)
redis.call('ZREM', K.job_outputs .. row.j, name)
output_leaves(name, (row.y == '1' or ARGV[4] == '1') and 'LST' or 'LT', row.h or '', row.k or '')
output_changed(name)
-- Indexes learn of deletions by the row that is missing; of those only the newest are kept.
redis.call('ZADD', K.output_tombstones, redis.call('ZSCORE', K.output_changes, name), name)
while redis.call('ZCARD', K.output_tombstones) > TOMBSTONES do
  local oldest = redis.call('ZPOPMIN', K.output_tombstones)
  redis.call('ZREM', K.output_changes, oldest[1])
  redis.call('HSET', K.output_totals, 'floor', oldest[2])
end
return flat
