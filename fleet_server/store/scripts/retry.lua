#!lua
-- A failed job queued again. KEYS: job, result, [idempotency]. ARGV: id, operation id, fingerprint
-- -> {'ok', fields} | {'reused'} | {'state', fields} | false: unknown
-- include: jobs
-- include: submitted

local id, operation = ARGV[3], ARGV[4]
local j = load(id)
local earlier = earlier_call(KEYS[3], ARGV[5], id)
if earlier then
  if earlier[1] == 'reused' then
    return earlier
  end
  return j and {'ok', flat_of(id, j)} or false
end
if not j then
  return false
end
if j.ro == operation then
  return {'ok', flat_of(id, j)}
end
if j.st ~= 'failed' then
  return {'state', flat_of(id, j)}
end

redis.call('ZREM', K.state .. 'failed', id)
redis.call('ZREM', K.ended, id)
redis.call('ZREM', K.dead, id)
if j.cb == '1' then
  keep_end(id, j, flat_of(id, j))
end
redis.call('DEL', KEYS[2])
local definition = j.ld
local wanted = cjson.decode(definition).lane_id or j.ln
local lane = join_lane(wanted, definition, j.cl)
j.ln, j.sc = lane, nil
local set = {st = 'queued', ge = tonumber(j.ge) + 1, en = NOW, ki = kind_of(j), li = limits_of(j), ro = operation}
local del = {'at', 'lo', 'lx', 'sa', 'ee', 'er', 'lt', 'ft', 'pn', 'ps', 'ra', 'cn', 'no', 'se', 'pg', 'sp', 'ss', 'lm',
  'rm', 'um'}
if lane == wanted then
  del[#del + 1] = 'ld'
end
save(id, j, set, del)
arrive(id, j, nil, 1)
emit('job_update', id, j)
remember_call(KEYS[3], ARGV[5], id)
return {'ok', flat_of(id, j)}
