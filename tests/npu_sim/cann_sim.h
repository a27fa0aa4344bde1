/* What the stand-in libraries share. */
#ifndef CANN_SIM_H
#define CANN_SIM_H

/* Append a line to calls_<RANK>.txt in the folder NPU_SIM_LOG, if that is set: a test reads the order of calls there. */
void sim_log(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Set what aclGetRecentErrMsg says about the call that failed last: torch_npu appends it to its exceptions. */
void sim_error(const char *text);

#endif
