#!lua flags=allow-oom
-- KEYS: job. ARGV: id, error or '' -> {'ok' | 'ended', fields} | false: unknown
-- include: ends

local id = ARGV[3]
local j = load(id)
if not j then
  return false
end
if j.st == 'cancelled' then
  return {'ok', flat_of(id, j)}
end
if j.st == 'succeeded' or j.st == 'failed' then
  return {'ended', flat_of(id, j)}
end
finish(id, j, 'cancelled', ARGV[4] ~= '' and {er = ARGV[4]} or {}, {})
return {'ok', flat_of(id, j)}
