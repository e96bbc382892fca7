// The Python module: plans, which are called with buffers or with addresses.
//
// Written against the stable ABI of Python 3.11, which setup.py asks for, so that one binary serves all
// later versions.

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <algorithm>
#include <new>

#include "run.hpp"
#include "xla_ffi.hpp"

namespace groupnorm {
namespace {

struct Plan {
  PyObject_HEAD
  Call call;  // without arrays
  bool by_openmp, parameters_of_samples;
};

// Calls of fewer elements keep Python's lock: releasing it takes longer.
constexpr i64 WORTH_UNLOCKING = 1 << 13;

// Whether this thread has released Python's lock.
thread_local bool is_unlocked = false;

// An argument: an object with a buffer, an address, or None.
class Array {
 public:
  // A thread that Python ends while it waits for the lock, as the process does, leaves its buffers.
  ~Array() {
    if (held_ && !is_unlocked) PyBuffer_Release(&view_);
  }

  // Return whether the object is usable, or not `needed`; if not, a Python error is set.
  bool read(PyObject* object, const char* name, i64 bytes, bool needed = true) {
    return get(object, name, bytes, PyBUF_SIMPLE, needed);
  }
  bool write(PyObject* object, const char* name, i64 bytes, bool needed = true) {
    return get(object, name, bytes, PyBUF_WRITABLE, needed);
  }

  template <class T>
  T* as() const { return static_cast<T*>(data_); }
  i64 bytes() const { return held_ ? view_.len : 0; }

 private:
  bool get(PyObject* object, const char* name, i64 bytes, int flags, bool needed) {
    const bool is_address = PyLong_Check(object) && !PyBool_Check(object);
    if (is_address) data_ = PyLong_AsVoidPtr(object);
    if (is_address || object == Py_None) {
      if (data_ == nullptr && needed && PyErr_Occurred() == nullptr) {
        PyErr_Format(PyExc_ValueError, "%s is missing", name);
      }
      return PyErr_Occurred() == nullptr;
    }
    if (PyObject_GetBuffer(object, &view_, flags) < 0) return false;
    held_ = true;
    data_ = view_.buf;
    if (view_.len >= bytes) return true;
    PyErr_Format(PyExc_ValueError, "%s has %zd bytes, and the plan needs %lld", name, view_.len,
                 static_cast<long long>(bytes));
    return false;
  }

  Py_buffer view_;
  bool held_ = false;
  void* data_ = nullptr;
};

bool has_count(Py_ssize_t given, Py_ssize_t wanted, const char* method) {
  if (given == wanted) return true;
  PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, not %zd", method, wanted, given);
  return false;
}

bool run_unlocked(const Call& call, bool by_openmp) {
  bool enough_memory = true;
  const auto attempt = [&] {
    try {
      run(call, by_openmp);
    } catch (const std::bad_alloc&) {
      enough_memory = false;
    }
  };
  if (call.shape.elements() < WORTH_UNLOCKING) {
    attempt();
  } else {
    is_unlocked = true;
    Py_BEGIN_ALLOW_THREADS
    attempt();
    Py_END_ALLOW_THREADS
    is_unlocked = false;
  }
  if (!enough_memory) PyErr_NoMemory();
  return enough_memory;
}

// The arrays that all directions read.
struct Inputs {
  Array x, scale, bias, mask;

  bool read(const Plan* plan, Call& call, PyObject* const* given) {
    const Shape& shape = call.shape;
    const i64 parameter = 4 * shape.channels() * (plan->parameters_of_samples ? shape.samples : 1);
    if (!x.read(given[0], "x", shape.elements() * item_bytes(call.x_dtype)) ||
        !scale.read(given[1], "scale", parameter, false) || !bias.read(given[2], "bias", parameter, false) ||
        !mask.read(given[3], "mask", shape.positions, false)) {
      return false;
    }
    call.x = x.as<void>();
    call.scale = scale.as<float>(), call.bias = bias.as<float>();
    call.parameter_stride = plan->parameters_of_samples ? shape.channels() : 0;
    call.mask = mask.as<std::uint8_t>();
    if (call.mask != nullptr && mask.bytes() == 0) {
      PyErr_SetString(PyExc_TypeError, "mask must be an object with a buffer");
      return false;
    }
    call.mask_stride = mask.bytes() >= shape.samples * shape.positions && shape.samples > 1 ? shape.positions : 0;
    return true;
  }
};

void set_statistics(Call& call, void* memory) {
  const i64 groups = call.shape.samples * call.shape.groups;
  call.mean = static_cast<double*>(memory);
  call.rstd = call.mean + groups;
  call.inv_count = call.rstd + groups;
}

i64 statistics_bytes(const Call& call) { return 3 * 8 * call.shape.samples * call.shape.groups; }

bool set_threads(Call& call, PyObject* threads) {
  int overflow;
  const long count = PyLong_AsLongAndOverflow(threads, &overflow);
  if (count == -1 && PyErr_Occurred()) return false;
  call.threads = static_cast<int>(overflow > 0 ? MOST_THREADS : std::min<i64>(std::max(count, 1L), MOST_THREADS));
  return true;
}

// forward(x, scale, bias, mask, y, keep, threads): the statistics for backward, as bytes, or None.
PyObject* forward(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  const Plan* plan = reinterpret_cast<Plan*>(self);
  Call call = plan->call;
  Inputs inputs;
  Array y;
  if (!has_count(count, 7, "forward") || !inputs.read(plan, call, given) ||
      !y.write(given[4], "y", call.shape.elements() * item_bytes(call.y_dtype)) || !set_threads(call, given[6])) {
    return nullptr;
  }
  call.stages = FORWARD;
  call.y = y.as<void>();
  PyObject* saved = nullptr;
  if (given[5] == Py_True) {
    saved = PyBytes_FromStringAndSize(nullptr, statistics_bytes(call));
    if (saved == nullptr) return nullptr;
    set_statistics(call, PyBytes_AsString(saved));
  }
  if (!run_unlocked(call, plan->by_openmp)) {
    Py_XDECREF(saved);
    return nullptr;
  }
  if (saved == nullptr) Py_RETURN_NONE;
  return saved;
}

// backward(x, scale, bias, mask, saved, dy, dy_dtype, dx, dscale, dbias, batches, threads)
PyObject* backward(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  const Plan* plan = reinterpret_cast<Plan*>(self);
  Call call = plan->call;
  Inputs inputs;
  Array saved, dy, dx, dscale, dbias;
  if (!has_count(count, 12, "backward") || !inputs.read(plan, call, given) || !set_threads(call, given[11])) return nullptr;
  const long dtype = PyLong_AsLong(given[6]);
  call.batches = PyLong_AsLong(given[10]);
  if (PyErr_Occurred()) return nullptr;
  if (call.batches < 1 || call.shape.samples % call.batches != 0 || dtype < 0 || dtype >= DTYPES ||
      (dtype != 0 && dtype != static_cast<long>(call.x_dtype))) {
    PyErr_SetString(PyExc_ValueError, "batches must divide the samples, and dy have x's dtype or float32");
    return nullptr;
  }
  call.y_dtype = static_cast<Dtype>(dtype);
  const i64 elements = call.shape.elements(), parameters = 4 * call.batches * call.shape.channels();
  if (!saved.read(given[4], "saved", statistics_bytes(call)) ||
      !dy.read(given[5], "dy", elements * item_bytes(call.y_dtype)) ||
      !dx.write(given[7], "dx", elements * item_bytes(call.x_dtype)) ||
      !dscale.write(given[8], "dscale", parameters) || !dbias.write(given[9], "dbias", parameters)) {
    return nullptr;
  }
  call.stages = BACKWARD;
  set_statistics(call, saved.as<void>());
  call.dy = dy.as<void>(), call.y = dx.as<void>();
  call.dscale = dscale.as<float>(), call.dbias = dbias.as<float>();
  if (!run_unlocked(call, plan->by_openmp)) return nullptr;
  Py_RETURN_NONE;
}

// stage(stages, x, scale, bias, mask, statistics, y, dy, sums, threads): one stage alone. `statistics`
// is (3, samples, groups), `sums` (2, samples, channels), or (2, samples, groups) for INPUT_GRADIENT.
PyObject* stage(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  const Plan* plan = reinterpret_cast<Plan*>(self);
  Call call = plan->call;
  Inputs inputs;
  Array statistics, y, dy, sums;
  if (!has_count(count, 10, "stage") || !inputs.read(plan, call, given + 1) || !set_threads(call, given[9])) return nullptr;
  const long stages = PyLong_AsLong(given[0]);
  if (PyErr_Occurred()) return nullptr;
  if (stages != MEASURE && stages != NORMALIZE && stages != SUM && stages != INPUT_GRADIENT) {
    PyErr_Format(PyExc_ValueError, "%ld is not a stage", stages);
    return nullptr;
  }
  call.stages = static_cast<Stages>(stages);
  const i64 elements = call.shape.elements(), samples = call.shape.samples;
  const i64 sums_each = stages == SUM ? samples * call.shape.channels() : samples * call.shape.groups;
  if (!call.forward()) call.y_dtype = call.x_dtype;
  const auto access = stages == MEASURE ? &Array::write : &Array::read;
  const bool writes = stages == NORMALIZE || stages == INPUT_GRADIENT;
  if (!(statistics.*access)(given[5], "statistics", statistics_bytes(call), true) ||
      !y.write(given[6], "y", elements * item_bytes(call.y_dtype), writes) ||
      !dy.read(given[7], "dy", elements * item_bytes(call.x_dtype), !call.forward()) ||
      !(stages == SUM ? sums.write(given[8], "sums", 16 * sums_each)
                      : sums.read(given[8], "sums", 16 * sums_each, stages == INPUT_GRADIENT))) {
    return nullptr;
  }
  set_statistics(call, statistics.as<void>());
  call.y = y.as<void>(), call.dy = dy.as<void>();
  call.sum_dy = sums.as<double>();
  call.sum_dy_xhat = call.sum_dy ? call.sum_dy + sums_each : nullptr;
  if (!run_unlocked(call, plan->by_openmp)) return nullptr;
  Py_RETURN_NONE;
}

// scratch_bytes(backward, masked, threads)
PyObject* scratch(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  const Plan* plan = reinterpret_cast<Plan*>(self);
  Call call = plan->call;
  if (plan->parameters_of_samples) call.batches = call.shape.samples;
  if (!has_count(count, 3, "scratch_bytes") || !set_threads(call, given[2])) return nullptr;
  call.stages = given[0] == Py_True ? BACKWARD : FORWARD;
  static const std::uint8_t masked = 1;
  if (given[1] == Py_True) call.mask = &masked;
  try {
    return PyLong_FromSize_t(scratch_bytes(call));
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  }
}

// So that no number of bytes overflows.
constexpr double MAX_ELEMENTS = 0x1p45;

PyObject* make(PyTypeObject* type, PyObject* arguments, PyObject* keywords) {
  long long samples, groups, size, positions;
  int channels_first, x, y, activation, by_openmp, of_samples;
  double epsilon;
  if (!PyArg_ParseTuple(arguments, "LLLLpiiidpp", &samples, &groups, &size, &positions, &channels_first, &x, &y,
                        &activation, &epsilon, &by_openmp, &of_samples)) {
    return nullptr;
  }
  if (keywords != nullptr) {
    PyErr_SetString(PyExc_TypeError, "Plan takes no keyword arguments");
    return nullptr;
  }
  const double elements = static_cast<double>(samples) * static_cast<double>(groups) *
      static_cast<double>(size) * static_cast<double>(positions);
  if (samples < 1 || groups < 1 || size < 1 || positions < 1 || elements > MAX_ELEMENTS || x < 0 || x >= DTYPES || y < 0 || y >= DTYPES ||
      activation < 0 || activation > 3) {
    PyErr_SetString(PyExc_ValueError, "a plan has positive sizes, at most 2**45 elements, known dtypes and a known activation");
    return nullptr;
  }
  const auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
  Plan* plan = reinterpret_cast<Plan*>(allocate(type, 0));
  if (plan == nullptr) return nullptr;
  plan->call = Call{};
  plan->call.shape = {samples, groups, size, positions, channels_first != 0};
  plan->call.x_dtype = static_cast<Dtype>(x), plan->call.y_dtype = static_cast<Dtype>(y);
  plan->call.activation = static_cast<Activation>(activation);
  plan->call.epsilon = epsilon, plan->call.batches = 1, plan->call.threads = 1;
  plan->by_openmp = by_openmp, plan->parameters_of_samples = of_samples;
  return reinterpret_cast<PyObject*>(plan);
}

void destroy(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

template <class Function>
PyCFunction method(Function function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)); }

PyMethodDef plan_methods[] = {
    {"forward", method(forward), METH_FASTCALL, nullptr},
    {"backward", method(backward), METH_FASTCALL, nullptr},
    {"stage", method(stage), METH_FASTCALL, nullptr},
    {"scratch_bytes", method(scratch), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyType_Slot plan_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make)},
    {Py_tp_dealloc, reinterpret_cast<void*>(destroy)},
    {Py_tp_methods, plan_methods},
    {0, nullptr},
};

PyType_Spec plan_spec = {"groupnorm.backends.kernels.cpu._core.Plan", sizeof(Plan), 0, Py_TPFLAGS_DEFAULT, plan_slots};

// use_openmp(address of GOMP_parallel)
PyObject* use_openmp(PyObject*, PyObject* address) {
  openmp = reinterpret_cast<GompParallel>(PyLong_AsVoidPtr(address));
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}

// xla_handler(): what JAX registers.
PyObject* handler(PyObject*, PyObject*) { return PyCapsule_New(xla_handler(), "xla._CUSTOM_CALL_TARGET", nullptr); }

bool set(PyObject* dict, PyObject* key, PyObject* value) {
  const bool done = key != nullptr && value != nullptr && PyDict_SetItem(dict, key, value) == 0;
  Py_XDECREF(key);
  Py_XDECREF(value);
  return done;
}

// xla_interface(): what the handler takes it to be, for tests: {constant: value}, with
// {(struct, field): (offset, size)}.
PyObject* interface_(PyObject*, PyObject*) {
  PyObject* found = PyDict_New();
#define GROUPNORM_CONSTANT(name, value) &&set(found, Py_BuildValue("s", #name), Py_BuildValue("i", value))
#define GROUPNORM_NOTHING(name)
#define GROUPNORM_FIELD(of, type, name, at) \
  &&set(found, Py_BuildValue("(ss)", #of, #name), Py_BuildValue("(ii)", at, static_cast<int>(sizeof(of::name))))
  const bool done = found != nullptr GROUPNORM_XLA_CONSTANTS(GROUPNORM_CONSTANT)
      GROUPNORM_XLA_STRUCTS(GROUPNORM_NOTHING, GROUPNORM_FIELD, );
#undef GROUPNORM_CONSTANT
#undef GROUPNORM_NOTHING
#undef GROUPNORM_FIELD
  if (!done) Py_CLEAR(found);
  return found;
}

PyMethodDef methods[] = {
    {"use_openmp", use_openmp, METH_O, nullptr},
    {"xla_handler", handler, METH_NOARGS, nullptr},
    {"xla_interface", interface_, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

int fill(PyObject* module) {
  PyObject* plan = PyType_FromSpec(&plan_spec);
  if (plan == nullptr) return -1;
  const int failed = PyModule_AddObjectRef(module, "Plan", plan);
  Py_DECREF(plan);
  return failed < 0 ? -1 : PyModule_AddStringConstant(module, "instructions", instructions());
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(fill)},
#if defined(Py_GIL_DISABLED)
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_core", "The kernels for CPUs.", 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace
}  // namespace groupnorm

PyMODINIT_FUNC PyInit__core() { return PyModuleDef_Init(&groupnorm::definition); }
