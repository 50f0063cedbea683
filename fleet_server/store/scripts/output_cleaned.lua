#!lua flags=allow-oom
-- The local file has been removed. KEYS: output. ARGV: filename -> 1 | 0: not in the bucket by the index, nothing changed
-- include: outputs

local row = to_table(redis.call('HGETALL', KEYS[1]))
if row.y ~= '1' then
  return 0
end
if row.l == '1' then
  output_not_local(ARGV[3], row)
  output_changed(ARGV[3])
end
return 1
