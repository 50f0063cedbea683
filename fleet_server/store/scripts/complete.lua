#!lua flags=allow-oom
-- Success of an attempt. KEYS: job, result. ARGV: id, token, result, load_ms, run_ms, upload_ms, then for each output:
-- filename, created_ms, size, record -> {'ok' | 'already' | 'refused', fields | false}
-- include: jobs
-- include: outputs

local id, token = ARGV[3], ARGV[4]
local j = load(id)
if not j then
  return {'refused', false}
end
if j.st == 'succeeded' and j.lt == token then
  return {'already', flat_of(id, j)}
end
local current = j.st == 'running' and j.tk == token
local late = j.st == 'queued' and j.lt == token
if not current and not late then
  return {'refused', flat_of(id, j)}
end

local set = {pg = 100}
if late then
  set.no = j.pn
  set.sa = j.ps
end
for n, field in ipairs({'lm', 'rm', 'um'}) do
  if ARGV[5 + n] ~= '' then
    set[field] = ARGV[5 + n]
  end
end
redis.call('SET', KEYS[2], ARGV[5])
for i = 9, #ARGV, 4 do
  put_output(ARGV[i], id, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
end
finish(id, j, 'succeeded', set, {'er'})
return {'ok', flat_of(id, j)}
