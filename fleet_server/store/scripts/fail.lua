#!lua flags=allow-oom
-- Failure of an attempt. KEYS: job, result, attempts. ARGV: id, token, error, attempt, retryable, backoff_ms, result,
-- reason, avoid_ms
-- -> {'ok' | 'already' | 'refused', fields | false}
-- include: attempts

local id, token = ARGV[3], ARGV[4]
local j = load(id)
if not j then
  return {'refused', false}
end
if j.ft == token then
  return {'already', flat_of(id, j)}
end
if j.st ~= 'running' or j.tk ~= token then
  return {'refused', flat_of(id, j)}
end

remember(id, 'P' .. ARGV[6])
local state = attempt_failed(id, j, ARGV[7] == '1', tonumber(ARGV[8]), tonumber(ARGV[11]), ARGV[5], ARGV[10])
if state == 'failed' and ARGV[9] ~= '' then
  redis.call('SET', KEYS[2], ARGV[9])
end
return {'ok', flat_of(id, j)}
