#!lua flags=allow-oom
-- A deleted output is gone from some of its places. KEYS: leaving. ARGV: filename, letters -> the letters that are left
-- include: outputs

local entry = redis.call('HGET', KEYS[1], ARGV[3])
if not entry then
  return ''
end
local places, rest = entry:match('^(%u*)(%z.*)$')
places = places:gsub('[' .. ARGV[4] .. ']', '')
if places == '' then
  redis.call('HDEL', KEYS[1], ARGV[3])
else
  redis.call('HSET', KEYS[1], ARGV[3], places .. rest)
end
return places
