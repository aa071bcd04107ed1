/* report_out.c - what a run remembers of itself, as a dict of plain Python objects.
 *
 * Leader.report calls it; parastep.Report is made of the dict.
 */
#include "options.h"
#include "run.h"

static PyObject *int_item(const void *values, int k)
{
  return PyLong_FromLong(((const int *)values)[k]);
}

static PyObject *double_item(const void *values, int k)
{
  return PyFloat_FromDouble(((const double *)values)[k]);
}

static PyObject *record_item(const void *records, int k)
{
  const ps_record *record = (const ps_record *)records + k;
  return Py_BuildValue("(iiiddO)", record->rank, record->step, record->round,
                       (double)record->begin_ns * 1e-9, (double)record->end_ns * 1e-9,
                       record->accepted ? Py_True : Py_False);
}

static PyObject *failure_item(const void *failures, int k)
{
  const ps_failure *failure = (const ps_failure *)failures + k;
  return Py_BuildValue("(iisN)", failure->rank, failure->step, ps_status_name(failure->status),
                       psb_text(failure->text));
}

PyObject *psb__report_out(const ps_report *report)
{
  return Py_BuildValue(
      "{s:i, s:i, s:i, s:i, s:i, s:i, s:d, s:K, s:N, s:N, s:N, s:N, s:N, s:N, s:N}", "steps",
      report->steps, "ranks", report->ranks, "rounds", report->rounds, "answered", report->answered,
      "interpolated", report->interpolated, "not_finite", report->not_finite, "seconds",
      (double)report->seconds_ns * 1e-9, "bytes_sent", (unsigned long long)report->bytes_sent,
      "evaluations", psb__list(report->ranks, int_item, report->evaluations), "accepted",
      psb__list(report->counted, int_item, report->accepted), "drift",
      psb__list(report->steps, double_item, report->drift), "cost",
      psb__list(report->steps, double_item, report->cost), "timeline",
      psb__list(report->records, record_item, report->timeline), "failures",
      psb__list(report->failed, failure_item, report->failures), "fallback",
      report->fallback != NULL ? psb_text(report->fallback) : Py_NewRef(Py_None));
}
