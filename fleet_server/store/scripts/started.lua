#!lua flags=allow-oom
-- Engines began. KEYS: jobs. ARGV: for each: id, token -> for each fields | false
-- include: jobs

local out = {}
for i = 3, #ARGV, 2 do
  local id = ARGV[i]
  local j = load(id)
  local mine = j and j.st == 'running' and j.tk == ARGV[i + 1]
  if mine and not j.sa then
    save(id, j, {sa = NOW, ra = '1', cn = '1'}, {})
    redis.call('ZADD', K.deadlines, NOW + tonumber(j.to), id)
    emit('job_update', id, j)
    if j.gj then
      group_started(j.gj)
    end
  end
  out[#out + 1] = mine and flat_of(id, j) or false
end
return out
