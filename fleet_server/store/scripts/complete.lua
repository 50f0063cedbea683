#!lua flags=allow-oom
-- Success of attempts. KEYS: job and result of each. ARGV: for each attempt: id, token, result, load_ms, run_ms,
-- upload_ms, number of outputs, then for each output: filename, created_ms, size, record, key, making, home
-- -> for each {'ok' | 'already' | 'refused', fields (joined where they can be) | false}
-- include: ends
-- include: outputs

local function completed(id, token, at)
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
  elseif not j.sa then
    -- A short run's start is told with its end; `sd` says so in the event.
    local took = (tonumber(ARGV[at + 3]) or 0) + (tonumber(ARGV[at + 4]) or 0)
    set.sa, j.sd = math.max(tonumber(j.en), NOW - took), '1'
    if j.gj then
      group_started(j.gj)
    end
  end
  for n, field in ipairs({'lm', 'rm', 'um'}) do
    if ARGV[at + 2 + n] ~= '' then
      set[field] = ARGV[at + 2 + n]
    end
  end
  -- (There is none of an earlier generation, and none of an attempt that failed before.)
  if ARGV[at + 2] ~= '' then
    redis.call('SET', K.result .. id, ARGV[at + 2])
  end
  for i = at + 7, at + 7 * ARGV[at + 6], 7 do
    put_output(ARGV[i], id, ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], ARGV[i + 6])
  end
  finish(id, j, 'succeeded', set, {'er'})
  return {'ok', joined_of(id, j) or flat_of(id, j)}
end

local out, at = {}, 3
gather_indexes()
while at <= #ARGV do
  out[#out + 1] = completed(ARGV[at], ARGV[at + 1], at)
  at = at + 7 + 7 * ARGV[at + 6]
end
write_indexes()
settle_ends()
return out
