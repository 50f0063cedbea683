-- include: base

-- A callback is a member "<job>.<generation>" of `hooks`, scored by the time at which it is next due (while one is
-- being sent: by the end of its claim), and, from its first claim on, a hash:
--   _s  pending, delivered or failed; absent: pending
--   _k  token of the claim under which it is being sent
--   _l  token of the claim that was settled last
--   _t  tries of this round
--   _a  log of tries, opaque here
--   _e  when it was delivered or given up
--   _r  1 once somebody asked for it again while it was being sent
--   _o  operation id of the last redelivery
--   _p  result of the job, and all fields of the job, once the job has gone on to another generation

local function job_of(member)
  return string.match(member, '^(.*)%.%d+$')
end

local function forget_hook(member)
  redis.call('ZREM', K.hooks, member)
  redis.call('DEL', K.hook .. member)
end

-- Keeps how a job ended for its callback, before the job goes on to its next generation. To be called, where j.cb is
-- '1', by each script that begins a generation, before it forgets the result.
local function keep_end(id, j, flat)
  local key = K.hook .. id .. '.' .. j.ge
  redis.call('HSET', key, unpack(flat))
  redis.call('HSET', key, '_p', redis.call('GET', K.result .. id) or '')
end

-- A callback as it stands: its hash, when it is next due.
local function hook_row(member)
  return {redis.call('HGETALL', K.hook .. member), redis.call('ZSCORE', K.hooks, member)}
end
