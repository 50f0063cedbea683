-- include: base

local function put_output(filename, job, created, size, record)
  redis.call('HSET', K.output .. filename, 'j', job, 'c', created, 's', size, 'r', record)
  redis.call('ZADD', K.outputs, created, filename)
  if job ~= '' then
    local last = redis.call('ZRANGE', K.job_outputs .. job, -1, -1, 'WITHSCORES')
    redis.call('ZADD', K.job_outputs .. job, 'NX', last[2] and tonumber(last[2]) + 1 or 0, filename)
  end
end
