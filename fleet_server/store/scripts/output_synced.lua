#!lua flags=allow-oom
-- The bucket verifiably holds the file. KEYS: output. ARGV: filename, key -> 1 | 0: deleted meanwhile, its object has to go
-- include: outputs

local row = to_table(redis.call('HGETALL', KEYS[1]))
if not row.s then
  local entry = redis.call('HGET', K.output_leaving, ARGV[3])
  local places = entry and entry:match('^(%u*)%z'):gsub('S', '') or ''
  output_leaves(ARGV[3], places .. 'S', entry and entry:match('^%u*%z(.-)%z') or '', ARGV[4])
  return 0
end
if row.y ~= '1' then
  redis.call('HSET', KEYS[1], 'y', '1', 'k', ARGV[4])
  count_output('s3', 1, tonumber(row.s))
  output_settled(ARGV[3], row)
  output_changed(ARGV[3])
end
return 1
