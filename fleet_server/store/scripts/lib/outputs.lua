-- include: base

-- Each change of a row has a number of its own, by which the replicas' indexes find what is new to them.
local function output_changed(filename)
  local number = redis.call('HINCRBY', K.output_totals, 'changes', 1)
  redis.call('ZADD', K.output_changes, number, filename)
end

local function count_output(kind, files, size)
  redis.call('HINCRBY', K.output_totals, kind .. ':files', files)
  redis.call('HINCRBY', K.output_totals, kind .. ':bytes', int(files * size))
end

-- The file is on the disk of the server `home` alone.
local function output_waits(filename, created, size, home)
  redis.call('ZADD', K.output_unsynced .. home, created, filename)
  count_output('unsynced', 1, size)
end

local function put_output(filename, job, created, size, record, key, making, home)
  local row = K.output .. filename
  local known = redis.call('EXISTS', row) == 1
  redis.call('HSET', row, 'j', job, 'r', record, 'k', key, 'm', making)
  if not known then
    redis.call('HSET', row, 'c', created, 's', size, 'h', home, 'l', '1')
    redis.call('ZREM', K.output_tombstones, filename)
    redis.call('ZADD', K.outputs, created, filename)
    redis.call('ZADD', K.output_local .. home, created, filename)
    count_output('local:' .. home, 1, size)
    output_waits(filename, created, size, home)
  end
  if job ~= '' then
    local last = redis.call('ZRANGE', K.job_outputs .. job, -1, -1, 'WITHSCORES')
    redis.call('ZADD', K.job_outputs .. job, 'NX', last[2] and tonumber(last[2]) + 1 or 0, filename)
  end
  output_changed(filename)
end

-- What is left of an output that has been deleted: the letters of the places where it may still be (L its server's disk,
-- S the bucket, T small pictures), its home, its key in the bucket.
local function output_leaves(filename, places, home, key)
  redis.call('HSET', K.output_leaving, filename, places .. '\0' .. home .. '\0' .. key)
end

-- No longer waits to be copied.
local function output_settled(filename, row)
  if redis.call('ZREM', K.output_unsynced .. row.h, filename) == 1 then
    count_output('unsynced', -1, tonumber(row.s))
  end
  if row.fa then
    redis.call('HDEL', K.output .. filename, 'fa', 'fr', 'fd')
    redis.call('ZREM', K.output_failed, filename)
  end
end

local function output_not_local(filename, row)
  if row.l == '1' then
    redis.call('HSET', K.output .. filename, 'l', '0')
    redis.call('ZREM', K.output_local .. row.h, filename)
    count_output('local:' .. row.h, -1, tonumber(row.s))
  end
end
