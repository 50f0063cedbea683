#!lua flags=no-writes
-- KEYS: zsets. ARGV: max, member, min, limit -> for each zset its members older than (max, member), with scores
-- include: pages

local out = {}
for i, key in ipairs(KEYS) do
  out[i] = older(key, ARGV[3], ARGV[4], ARGV[5], tonumber(ARGV[6]))
end
return out
