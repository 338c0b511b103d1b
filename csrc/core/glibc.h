// Included first in every source, so that a library built on a new system also loads on an old one: with glibc 2.28 and
// libstdc++ of GCC 8, the platform of torch's wheels (manylinux_2_28).
#pragma once

#include <exception>
#include <istream>
#include <new>
#include <string>

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GLIBCXX__) && !defined(__CUDA_ARCH__)

// A linker chooses the newest version of a function unless told otherwise. These have older ones, which differ in how
// they report errors, not in their results.
__asm__(".symver exp,exp@GLIBC_2.2.5");
__asm__(".symver log,log@GLIBC_2.2.5");
__asm__(".symver pow,pow@GLIBC_2.2.5");
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");

// libstdc++ reads this variable, new in glibc 2.32, to count references without atomic instructions while there is one
// thread. Each library has its own, which says that there may be several.
extern "C" {
__attribute__((visibility("hidden"), weak)) char __libc_single_threaded = 0;
}

// String streams are compiled into each library, because GCC 9 and 11 added functions to those of libstdc++.
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
#undef _GLIBCXX_EXTERN_TEMPLATE
#define _GLIBCXX_EXTERN_TEMPLATE 1

// The headers of GCC 11 and later call functions that older versions of libstdc++ lack; each library has its own.
#if _GLIBCXX_RELEASE >= 11

extern "C" {
// The copy constructor and the destructor of std::exception_ptr, which older versions have as functions.
void recis_copy_exception(void* to, const std::exception_ptr& from);
void recis_drop_exception(std::exception_ptr& pointer);
}
__asm__(".symver recis_copy_exception,_ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver recis_drop_exception,_ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");

namespace std {

__attribute__((weak)) void __throw_bad_array_new_length() { throw bad_array_new_length(); }

__attribute__((weak)) void __exception_ptr::exception_ptr::_M_addref() noexcept {
  alignas(exception_ptr) char copy[sizeof(exception_ptr)];
  recis_copy_exception(copy, *this);  // never dropped
}

__attribute__((weak)) void __exception_ptr::exception_ptr::_M_release() noexcept {
  recis_drop_exception(*this);
  _M_exception_object = nullptr;
}

}  // namespace std

__asm__(".hidden _ZSt28__throw_bad_array_new_lengthv");
__asm__(".hidden _ZNSt15__exception_ptr13exception_ptr9_M_addrefEv");
__asm__(".hidden _ZNSt15__exception_ptr13exception_ptr10_M_releaseEv");

#endif
#endif
