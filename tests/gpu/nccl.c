/* nccl.c - the nccl transport as a program uses it: two processes, each with a CUDA device.
 *
 *     nccl LEADER FOLLOWER [--small]
 *
 * tests/gpu/run.py runs it with both ranks on one device, where each process gets a host id of its
 * own since NCCL refuses two ranks of one host on one device, and with a device each.  It prints
 * one JSON object a line: runs at tolerance 0 and without a limit, the time of a round without a
 * model, a run whose follower is killed.  --small is for the stand-in libraries.
 */
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "parastep_backend.h"
#include "parastep_transport.h"

enum { STEPS = 12, PATIENCE_S = 60, TIMED_STEPS = 200 };

/* What both ends do one after the other. */
enum { EXACT, LOOSE, TIMED, KILLED, RUNS };

static ps_layout layout = {1, 1 << 20, PS_F16, PS_F16};

static size_t latent_bytes(void)
{
  return sizeof(uint16_t) * layout.size;
}

static void need(ps_status status, const char *what)
{
  if (status != PS_OK) {
    fprintf(stderr, "%s: %s: %s\n", what, ps_status_name(status), ps_last_error());
    exit(1);
  }
}

static ps_wait within(int seconds)
{
  return (ps_wait){ps_now_ns() + seconds * INT64_C(1000000000), NULL, NULL};
}

/* ---- both ends ------------------------------------------------------------------------------- */

typedef struct end {
  const ps_backend *backend;
  ps_pair *pair;
  int run;
} end;

/* m = (0.3 + step / 100) x, made on the device; nearly nothing where rounds are timed. */
static int evaluate(void *ctx, int rank, int step, const void *x, void *m)
{
  const end *self = ctx;
  const double weight = self->run == TIMED ? 0 : 0.3 + 0.01 * step;
  const ps_term in = {x, PS_F16};
  if (self->run == KILLED && rank > 0 && step >= 4) {
    raise(SIGKILL);
  }
  return self->backend->lincomb(self->backend, layout.size, 1, 1, &weight, &in, &m, PS_F16) !=
         PS_OK;
}

static void connect_end(end *self, int device, ps_role role, const unsigned char *id)
{
  ps_wait wait = within(PATIENCE_S);
  need(ps_cuda_open(device, &self->backend), "open");
  need(ps_nccl_connect(id, role, self->backend, &wait, &self->pair), "connect");
}

static void disconnect_end(end *self)
{
  ps_nccl_close(self->pair);
  self->backend->release(self->backend);
}

/* ---- follower -------------------------------------------------------------------------------- */

static void follow(int device, const unsigned char *id)
{
  end self = {.run = EXACT};
  connect_end(&self, device, PS_FOLLOWS, id);
  for (; self.run < RUNS; ++self.run) {
    ps_link *link;
    ps_follower *follower;
    ps_wait wait = within(PATIENCE_S);
    need(ps_nccl_open(self.pair, self.backend, &layout, 1, &link), "the follower's link");
    need(ps_follower_create(&layout, link, &follower), "follower");
    need(ps_serve(follower, 1, evaluate, &self, &wait, PS_F16), "following");
    ps_follower_destroy(follower);
  }
  disconnect_end(&self);
}

/* ---- leader ---------------------------------------------------------------------------------- */

/* Host memory is a mirror's far side: x goes there and back. */
static void move(const end *self, uint16_t *host, void *device, int to_device)
{
  const size_t bytes = latent_bytes();
  ps_mirror *way;
  need(self->backend->mirror(self->backend, ps_backend_find("cpu"), bytes, &way), "mirror");
  if (to_device) {
    memcpy(way->memory[PS_FAR], host, bytes);
    need(way->ops->send(way, PS_FAR, 0, bytes), "send");
    need(way->ops->receive(way, PS_NEAR), "receive");
    need(self->backend->copy(self->backend, device, way->memory[PS_NEAR], bytes), "copy");
  } else {
    need(self->backend->copy(self->backend, way->memory[PS_NEAR], device, bytes), "copy");
    need(way->ops->send(way, PS_NEAR, 0, bytes), "send");
    need(way->ops->settle(way, PS_NEAR, NULL), "settle");
    memcpy(host, way->memory[PS_FAR], bytes);
  }
  need(self->backend->settle(self->backend, NULL), "settle");
  way->ops->close(way, PS_NEAR);
  way->ops->close(way, PS_FAR);
}

static ps_program *new_program(int steps)
{
  double sigma[TIMED_STEPS + 1];
  ps_program *program;
  for (int j = 0; j <= steps; ++j) {
    sigma[j] = 10.0 * (steps - j) / steps;
  }
  need(ps_program_euler(steps, sigma, &program), "program");
  return program;
}

/* A run over the link, or alone; x at its end, and what the report says. */
static void lead(end *self, ps_link *link, uint16_t *x, ps_report *report, ps_leader **leader)
{
  ps_link *links[2] = {NULL, link};
  ps_options options;
  ps_program *program = new_program(self->run == TIMED ? TIMED_STEPS : STEPS);
  void *there = self->backend->alloc(self->backend, latent_bytes());
  need(there != NULL ? PS_OK : PS_NO_MEMORY, "memory");
  ps_options_init(&options);
  options.max_stride = 1;
  options.tolerance = self->run == LOOSE ? INFINITY : 0;
  options.deadline_ns = self->run == KILLED ? INT64_C(2000000000) : 0;
  for (size_t i = 0; i < layout.size; ++i) {
    x[i] = (uint16_t)(0x3c00 + i % 1024); /* 1 to 2 */
  }
  move(self, x, there, 1);
  need(ps_leader_create(program, &layout, &options, self->backend, links, link != NULL ? 2 : 1,
                        NULL, leader),
       "leader");
  need(ps_sample(*leader, evaluate, self, NULL, there), "leading");
  move(self, x, there, 0);
  need(ps_leader_report(*leader, report), "report");
  self->backend->free(self->backend, there);
  ps_program_release(program);
}

/* Whether it went as it should. */
static int check_run(end *self, const uint16_t *alone, uint16_t *x)
{
  static const char *const names[RUNS] = {"exact", "loose", "timed", "killed"};
  ps_link *link;
  ps_leader *leader;
  ps_report report;
  need(ps_nccl_open(self->pair, self->backend, &layout, 1, &link), "the leader's link");
  int64_t began = ps_now_ns();
  lead(self, link, x, &report, &leader);
  double seconds = (double)(ps_now_ns() - began) / 1e9;
  int same = memcmp(x, alone, latent_bytes()) == 0;
  printf("{\"run\": \"%s\", \"steps\": %d, \"rounds\": %d, \"same\": %d, \"lost\": %d, "
         "\"of_follower\": %d, \"MB_sent\": %.1f, \"seconds\": %.4f, \"us_a_round\": %.1f}\n",
         names[self->run], report.steps, report.rounds, same, report.failed, report.evaluations[1],
         (double)report.bytes_sent / 1e6, seconds, (double)report.seconds_ns / 1e3 / report.rounds);
  int well = self->run == KILLED  ? same && report.failed == 1
             : self->run == EXACT ? same && report.failed == 0 && report.rounds == STEPS
             : self->run == LOOSE ? report.failed == 0 && report.rounds < STEPS
                                  : report.failed == 0;
  ps_leader_destroy(leader);
  return well;
}

static int lead_all(int device, const unsigned char *id)
{
  uint16_t *alone = malloc(latent_bytes()), *x = malloc(latent_bytes());
  end self = {.run = EXACT};
  ps_leader *leader;
  ps_report report;
  int well = 1;
  connect_end(&self, device, PS_LEADS, id);
  lead(&self, NULL, alone, &report, &leader);
  ps_leader_destroy(leader);
  for (; self.run < RUNS; ++self.run) {
    well = check_run(&self, alone, x) && well;
  }
  disconnect_end(&self);
  free(alone);
  free(x);
  return well;
}

/* ---- processes ------------------------------------------------------------------------------- */

/* Before either of them has touched CUDA, which does not survive a fork. */
static int start_follower(int device, int *id_to)
{
  int ends[2];
  if (pipe(ends) != 0) {
    return -1;
  }
  int child = fork();
  if (child == 0) {
    unsigned char id[PS_NCCL_ID_BYTES];
    close(ends[1]);
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* it does not outlive a leader that fails */
    setenv("NCCL_HOSTID", "parastep-follower", 0);
    if (read(ends[0], id, sizeof id) == (ssize_t)sizeof id) {
      follow(device, id);
    }
    _exit(0);
  }
  close(ends[0]);
  *id_to = ends[1];
  return child;
}

static int run_both(int leader, int follower)
{
  unsigned char id[PS_NCCL_ID_BYTES];
  int id_to, status = 0;
  setenv("NCCL_SOCKET_IFNAME", "lo", 0);
  setenv("NCCL_NET", "Socket", 0); /* whatever plugins and cards are there */
  int child = start_follower(follower, &id_to);
  if (child < 0) {
    perror("starting a process");
    return 0;
  }
  setenv("NCCL_HOSTID", "parastep-leader", 0);
  printf("{\"nccl\": %d, \"devices\": \"%d, %d\"}\n", ps_nccl_version(), leader, follower);
  need(ps_nccl_id(id), "id");
  if (write(id_to, id, sizeof id) != (ssize_t)sizeof id) {
    perror("telling the id");
    return 0;
  }
  int well = lead_all(leader, id);
  kill(child, SIGKILL); /* where it is still waiting for a run */
  waitpid(child, &status, 0);
  return well;
}

int main(int argc, char **argv)
{
  if (argc < 3) {
    fprintf(stderr, "usage: nccl LEADER FOLLOWER [--small]\n");
    return 2;
  }
  int leader = (int)strtol(argv[1], NULL, 10), follower = (int)strtol(argv[2], NULL, 10);
  layout.size = argc > 3 ? 4096 : layout.size;
  setvbuf(stdout, NULL, _IOLBF, 0); /* nothing unwritten is there twice after a fork */
  return !run_both(leader, follower);
}
