// Writes a dashboard's queries as Prometheus rules, for promtool to check.
import { readFileSync } from 'node:fs'

const { panels } = JSON.parse(readFileSync(process.argv[2]))
const rules = panels
  .flatMap((p) => p.targets ?? [])
  .map((t, i) => ({ record: `query_${i}`, expr: t.expr.replaceAll('$__rate_interval', '1m') }))
console.log(JSON.stringify({ groups: [{ name: 'dashboard', rules }] }))
