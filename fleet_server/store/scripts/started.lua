#!lua flags=allow-oom
-- The engine began. KEYS: job. ARGV: id, token -> fields | false
-- include: jobs

local id = ARGV[3]
local j = load(id)
if not j or j.st ~= 'running' or j.tk ~= ARGV[4] then
  return false
end
if not j.sa then
  save(id, j, {sa = NOW, ra = '1', cn = '1'}, {})
  redis.call('ZADD', K.deadlines, NOW + tonumber(j.to), id)
  emit('job_update', id, j)
end
return flat_of(id, j)
